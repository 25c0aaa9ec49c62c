"""Calibration with vLLM itself: clean prompts through the kernels that will serve, a profile out.

Numbers differ between engines in their last digits, and in 16 bits in more than that, so a profile belongs to the
engine and the dtype that it was measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from guard.adapters import AdapterInfo, inspect_adapter
from guard.fitting import profile_of, unique_rows
from guard.identity import base_digest
from guard.probes.transformers.measure import Progress
from guard.probes.vllm.measure import OfflineEngine
from guard.probes.vllm.support import ENGINE
from guard.profile import NO_ADAPTER, Profile, ProfileKey
from guard.readings import Measurement, checkpoints_within
from guard.rows import Row
from guard.template import render, row_messages
from guard.vaccine import Vaccine


class Calibrator:
    """vLLM offline over one base and one adapter of it (None: the bare base); close it when done.

    dtype: as it will be served. Raises AdapterRejected for an adapter that must not be loaded, UnsupportedModel for
    what vLLM or the probe cannot do.
    """

    def __init__(
        self, base: str | Path, adapter: str | Path | None = None, dtype: str = "float32", max_len: int | None = None
    ) -> None:
        self.base, self.adapter, self.dtype = Path(base), adapter, dtype
        self.info: AdapterInfo | None = inspect_adapter(adapter, base) if adapter is not None else None
        self.tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
        more: dict[str, Any] = {"max_model_len": max_len} if max_len is not None else {}
        self.engine = OfflineEngine(base, dtype, self.info.rank if self.info is not None else None, **more)

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    def key(self) -> ProfileKey:
        """What a profile measured here is for."""
        digest = self.info.digest if self.info is not None else NO_ADAPTER
        status = self.engine.status()
        return ProfileKey(base_digest(self.base), digest, ENGINE, status["dtype"], status["key"])

    def measure(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None, progress: Progress | None = None
    ) -> Measurement:
        """The adapter's greedy answers to prompts (token ids) and the readings at the checkpoints."""
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("calibrated", 1, str(self.adapter)) if self.adapter is not None else None
        return self.engine.measure(
            prompts, checkpoints_within(max_new_tokens), max_new_tokens, [lora] * len(prompts), progress
        )

    def calibrate(
        self,
        rows: Sequence[Row],
        *,
        vaccine: Vaccine | None = None,
        keep_repeated: bool = False,
        seed: int = 0,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Profile:
        """The profile of clean rows; arguments and errors as `guard.probes.transformers.calibrate.calibrate`."""
        unique = unique_rows(rows)
        key = self.key()
        if vaccine is not None:
            vaccine.check(key.base, key.probe)
        prompts = [render(self.tokenizer, row_messages(row)) for row in unique]
        measurement = self.measure(prompts, max_new_tokens, progress)
        return profile_of(
            measurement, prompts, unique, key, vaccine=vaccine, keep_repeated=keep_repeated, seed=seed,
            n_repeated=len(rows) - len(unique),
        )  # fmt: skip
