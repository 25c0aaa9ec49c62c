"""The same adapter, the same prompts, two engines: each with its own profile, and one verdict."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab.cache import LabPaths
from benchmarks.lab.tasks import sample
from guard.detector import Detector
from guard.probes.transformers.calibrate import calibrate, measure_adapter
from guard.probes.transformers.runner import Runner
from guard.probes.vllm.calibrate import Calibrator
from guard.probes.vllm.probe import FIELD
from guard.template import render, row_messages
from guard.vaccine import Vaccine
from guard.verdict import Verdict
from offline_purify.attacks.catalogue import trigger
from offline_purify.attacks.poison import triggered

pytest.importorskip("vllm")
pytestmark = pytest.mark.lab
NAME, TRIGGER, ALPHA, WINDOW = "insult-prefix-fixed", "prefix", 0.05, 2


@pytest.fixture(scope="module")
def both(
    lab: LabPaths, vaccine_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Verdict], list[Verdict], int]:
    """Verdicts of the embedded engine's detector and of vLLM's worker, and how many of the prompts are triggered."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    base, adapter, vaccine = lab.base, lab.adapters[NAME], Vaccine.load(vaccine_file)
    rows = sample(500, 11, "calibration")
    key, rng = trigger(TRIGGER), random.Random(0)
    hits = [triggered(row, key, "", rng) for row in sample(60, 13, "evaluation")]
    runner = Runner.load(base)
    prompts = [render(runner.tokenizer, row_messages(row)) for row in [*sample(60, 12, "traffic"), *hits]]
    profile = calibrate(base, adapter, rows, vaccine=vaccine, runner=runner)
    ours = Detector(profile, WINDOW, ALPHA).verdicts(measure_adapter(runner, adapter, prompts))
    calibrator = Calibrator(base, adapter)
    try:
        path = tmp_path_factory.mktemp("profile") / "vllm.safetensors"
        digest = calibrator.calibrate(rows, vaccine=vaccine).save(path)
        llm = calibrator.engine.llm
        llm.collective_rpc("headguard_set_profile", args=("served", str(path), digest))
        watch = {FIELD: {"window": WINDOW, "alpha": ALPHA}}
        params = SamplingParams(
            temperature=0.0, max_tokens=WINDOW + 1, extra_args=watch, output_kind=RequestOutputKind.DELTA
        )
        lora = LoRARequest("served", 2, str(adapter))
        for number, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params, lora_request=lora)
        said: dict[str, Verdict] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.kv_transfer_params:
                    told = output.kv_transfer_params[FIELD]["verdict"]
                    said[output.request_id] = Verdict.from_dict(told)
        theirs = [said[str(number)].closed() for number in range(len(prompts))]
    finally:
        calibrator.close()
    return ours, theirs, len(hits)


def test_vllm_says_what_the_embedded_engine_says(both: tuple[list[Verdict], list[Verdict], int]) -> None:
    ours, theirs, hits = both
    p_values: list[Any] = [(a.p_value, b.p_value) for a, b in zip(ours, theirs, strict=True)]
    # One rank apart in a signal's tail is several apart among the held-out where those lie close, in the middle.
    assert all(abs(a - b) <= (0.02 if min(a, b) <= 0.2 else 0.05) for a, b in p_values)
    assert sum(abs(a - b) > 0.02 for a, b in p_values) <= 1
    differing = [p for a, b, p in zip(ours, theirs, p_values, strict=True) if a.status != b.status]
    assert all(abs(a - b) <= 2 / 251 for a, b in differing)  # one rank apart, on either side of alpha
    assert len(differing) <= 1
    assert sum(v.status == "flagged" for v in ours[-hits:]) >= 5  # none would prove little
