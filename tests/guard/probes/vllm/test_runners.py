"""Where the guard goes into both model runners: what it finds there in vLLM itself, and the V2 runner's way of a step.

The V2 runner needs a GPU, so its steps are taken by a stand-in that calls what vLLM's calls, in vLLM's order.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from guard.errors import UnsupportedModel
from guard.gram import PROMPT_ROWS
from guard.probes.vllm import runner_v1, runner_v2
from guard.probes.vllm.attach import let_in
from guard.probes.vllm.scheduling import NOTES
from tests.guard.conftest import LAYERS
from tests.guard.probes.vllm.test_probe import HEADS, PROMPT, Worker, told

SURE = 3


def test_both_runners_of_this_vllm_have_the_places_and_the_books() -> None:
    pytest.importorskip("vllm")
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

    assert all(hasattr(FirstRunner, name) for name in runner_v1.AROUND)
    taken = {name: list(inspect.signature(getattr(SecondRunner, name)).parameters)[1:] for name in runner_v2.AROUND}
    assert taken == {
        "initialize_kv_cache": ["kv_cache_config", "is_profiling", "kv_cache_allocation_context"],
        "finish_requests": ["scheduler_output"],
        "add_requests": ["scheduler_output"],
        "prepare_attn": ["input_batch"],
        "sample": ["hidden_states", "input_batch", "grammar_output"],
        "sample_tokens": ["grammar_output"],
    }
    assert {"req_ids", "num_reqs", "num_computed_tokens_np", "query_start_loc_np"} <= {
        f.name for f in fields(InputBatch)
    }
    assert {"finished_req_ids", "preempted_req_ids", "scheduled_new_reqs"} <= {f.name for f in fields(SchedulerOutput)}
    assert {"req_id", "lora_request", "sampling_params", "prompt_len"} <= set(dir(NewRequestData)) | {
        f.name for f in fields(NewRequestData)
    }
    assert callable(AsyncOutput.get_output)


def test_a_runner_without_the_place_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"no SimpleNamespace\.sample, where the guard goes in"):
        let_in(SimpleNamespace, "sample", lambda function: function)


@dataclass
class Output:
    """A step's output, whose tokens are known when it is fetched."""

    req_id_to_index: dict[str, int]
    sampled_token_ids: list[list[int]] = field(default_factory=list)


class Model:
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), 11)
        logits[:, SURE] = 4.0
        return logits


class Stand:
    """Takes steps as vLLM's V2 runner does. look: what its attention layers would call."""

    def __init__(self, worker: Worker) -> None:
        self.headguard, self.vectors, self.model = worker.probe, worker.vectors, Model()

    def finish_requests(self, scheduled: Any) -> None: ...

    def add_requests(self, scheduled: Any) -> None: ...

    def prepare_attn(self, batch: Any) -> Any:
        return (torch.zeros(8, 16, dtype=torch.int32).numpy(),), None

    def sample(self, hidden: torch.Tensor, batch: Any, grammar: Any) -> torch.Tensor:
        return self.model.compute_logits(hidden)

    def sample_tokens(self, grammar: Any) -> Any:
        batch = self.batch
        logits = self.sample(torch.zeros(batch.num_reqs, 4), batch, grammar)
        assert len(logits) == batch.num_reqs
        output = Output({request: row for row, request in enumerate(batch.req_ids)})

        def get_output() -> Output:
            output.sampled_token_ids = [[SURE] if ready else [] for ready in batch.ready]
            return output

        return SimpleNamespace(get_output=get_output)

    def step(self, new: dict[str, int] | None = None, gone: tuple[str, ...] = (), **rows: Any) -> dict[str, Any]:
        """new: prompt tokens of requests that come (again); rows: request to (computed, now, ready). The notes."""
        scheduled = SimpleNamespace(
            finished_req_ids=set(gone),
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, lora_request=None, prompt_len=length,
                                sampling_params=SimpleNamespace(extra_args=told(window=2, alpha=0.02)))
                for name, length in (new or {}).items()
            ],
        )  # fmt: skip
        self.finish_requests(scheduled)
        self.add_requests(scheduled)
        if not rows:
            return {}
        starts = np.concatenate([[0], np.cumsum([now for _, now, _ in rows.values()])])
        self.batch = SimpleNamespace(
            req_ids=list(rows), num_reqs=len(rows), query_start_loc_np=starts,
            num_computed_tokens_np=np.asarray([before for before, _, _ in rows.values()]),
            ready=[ready for _, _, ready in rows.values()],
        )  # fmt: skip
        self.prepare_attn(self.batch)
        for layer in range(LAYERS):
            self.headguard.look(layer, *self.vectors(int(starts[-1])), torch.zeros(1, HEADS, 16, 32))
        return getattr(self.sample_tokens(None).get_output(), NOTES, {})


@pytest.fixture
def stand(profile: Path) -> tuple[Stand, Worker]:
    class Guarded(Stand): ...

    for name, around in runner_v2.AROUND.items():
        if name != "initialize_kv_cache":
            let_in(Guarded, name, around)
    worker = Worker()
    worker.probe.set_profile("", str(profile), None)
    return Guarded(worker), worker


def test_the_second_runners_rows_are_read_in_chunks_and_judged(stand: tuple[Stand, Worker]) -> None:
    runner, worker = stand
    assert runner.step(new={"a": PROMPT}, a=(0, 10, False)) == {}
    assert worker.observed == []
    notes = [
        runner.step(a=(10, PROMPT - 10, True)),
        runner.step(a=(PROMPT, 1, True)),
        runner.step(a=(PROMPT + 1, 1, True)),
    ]
    assert [note["a"]["verdict"]["step"] for note in notes] == [0, 1, 2]
    assert {note["a"]["verdict"]["status"] for note in notes} == {"clean"}
    expected = [(layer, PROMPT + t) for layer in range(LAYERS) for t in range(1 - PROMPT_ROWS, 3)]
    assert sorted(worker.observed) == expected
    assert "compute_logits" not in vars(runner.model)
    runner.step(gone=("a",))
    assert worker.probe.status()["in_flight"] == {}


def test_a_preempted_request_of_the_second_runner_keeps_what_was_read(stand: tuple[Stand, Worker]) -> None:
    runner, worker = stand
    runner.step(new={"a": PROMPT, "b": PROMPT}, a=(0, PROMPT, True), b=(0, PROMPT, True))
    runner.step(b=(PROMPT, 1, True))
    # It comes again as a new request that computes its prompt and its first token once more.
    again = runner.step(new={"a": PROMPT}, b=(PROMPT + 1, 1, True), a=(0, PROMPT + 1, True))
    assert again["a"]["verdict"]["step"] == 1
    last = runner.step(a=(PROMPT + 1, 1, True))
    assert (last["a"]["verdict"]["step"], last["a"]["verdict"]["status"]) == (2, "clean")
    assert worker.probe.status()["blind"] == 0
    # One that has ended is new when its name comes back.
    runner.step(gone=("b",))
    assert runner.step(new={"b": PROMPT}, b=(0, PROMPT, True))["b"]["verdict"]["step"] == 0
