"""Many prompts through vLLM offline, with the probe that will watch the served engine: what calibration needs.

`OfflineEngine` starts vLLM's own engine on a base; `measure` answers prompts greedily, as
`guard.probes.transformers.measure` does, and gives the same `Measurement`. The worker leaves its readings in a file, so
that the way between processes carries nothing large.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from guard.errors import GuardError, UnsupportedModel
from guard.probes.transformers.measure import Progress
from guard.probes.vllm.plugin import PLUGIN
from guard.probes.vllm.probe import FIELD
from guard.probes.vllm.recorded import readings_of
from guard.probes.vllm.support import check_version
from guard.readings import CHECKPOINTS, Measurement

_TOGETHER = 256
_PATIENCE_S = 60.0


class OfflineEngine:
    """vLLM on a base model (and one adapter at a time) with the probe attached; close it when done.

    dtype: as served; guarded False: vLLM as it comes, to compare with; options: more of vLLM's engine arguments
    (max_model_len, max_num_seqs, …).
    """

    def __init__(
        self,
        base: str | Path,
        dtype: str = "float32",
        lora_rank: int | None = None,
        guarded: bool = True,
        **options: Any,
    ) -> None:
        try:
            check_version(version("vllm"))
        except ImportError as error:
            raise UnsupportedModel("vLLM is not installed here: `make vllm` installs it.") from error
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["VLLM_PLUGINS"] = PLUGIN if guarded else ""
        from vllm import LLM

        make: Any = LLM

        arguments: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True}
        if lora_rank:
            # One slot more than adapters: vLLM's CPU kernels give rows without an adapter what the last slot holds.
            arguments |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": max(8, lora_rank)}
        self.llm: Any = make(model=str(base), dtype=dtype, **{**arguments, **options})

    def close(self) -> None:
        """Ends the engine and its processes."""
        self.llm.llm_engine.engine_core.shutdown(timeout=_PATIENCE_S)

    def status(self) -> dict[str, Any]:
        """The worker's `headguard_status`."""
        return self.llm.collective_rpc("headguard_status")[0]

    def measure(
        self,
        prompts: Sequence[Sequence[int]],
        checkpoints: Sequence[int] = CHECKPOINTS,
        max_new_tokens: int | None = None,
        adapters: Sequence[Any] | None = None,
        progress: Progress | None = None,
    ) -> Measurement:
        """Greedy answers to `prompts` (token ids each) with the guard's readings at `checkpoints`.

        adapters: vLLM's `LoRARequest` (None: the base) of each prompt. Answers are without the end-of-sequence token;
        a prompt is in the readings of a checkpoint only if it got that far. Raises GuardError for an empty prompt.
        """
        from vllm import SamplingParams

        if not all(len(prompt) for prompt in prompts):
            raise GuardError("a prompt has no tokens: nothing to continue.")
        steps = sorted(set(checkpoints))
        limit = steps[-1] + 1 if max_new_tokens is None else max_new_tokens
        loras = list(adapters) if adapters is not None else [None] * len(prompts)
        answers: list[list[int]] = []
        parts: list[dict[str, np.ndarray]] = []
        self.llm.collective_rpc("headguard_record", args=(steps,))
        try:
            for start in range(0, len(prompts), _TOGETHER):
                group = range(start, min(start + _TOGETHER, len(prompts)))
                outputs = self.llm.generate(
                    [{"prompt_token_ids": list(prompts[i])} for i in group],
                    [
                        SamplingParams(temperature=0.0, max_tokens=limit, detokenize=False,
                                       extra_args={FIELD: {"record": i}})
                        for i in group
                    ],
                    use_tqdm=False,
                    lora_request=[loras[i] for i in group],
                )  # fmt: skip
                for output in outputs:
                    told = output.outputs[0]
                    tokens = list(told.token_ids)
                    ended = told.finish_reason == "stop"
                    answers.append(tokens[:-1] if ended and tokens else tokens)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "recorded.npz"
                    self.llm.collective_rpc("headguard_recorded", args=(str(path),))
                    with np.load(path) as arrays:
                        parts.append(dict(arrays))
                if progress is not None:
                    progress(len(answers), len(prompts))
        finally:
            self.llm.collective_rpc("headguard_record", args=(None,))
        at = {step: readings_of(step, parts) for step in steps}
        return Measurement(np.asarray([len(p) for p in prompts], dtype=np.int64), answers, at)
