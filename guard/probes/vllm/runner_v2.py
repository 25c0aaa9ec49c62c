"""Where the guard goes into vLLM's V2 model runner, the default on GPUs.

Written against the sources of vLLM 0.32; it needs a GPU, and has not run on one yet. `headguard serve` therefore starts
vLLM with the V1 runner. The probe is the same; what differs is where the runner keeps its books:

- preempted requests come again as new ones, finished ones go before others come, so who is known keeps its place;
- the batch's order is final in `prepare_attn`, which also gathers the block tables; no dummy run goes through it;
- logits are computed inside `sample`, and tokens are known when the step's output is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any

from guard.probes.vllm.attach import Around, notes_leave, probe_made, request_comes


def _requests_go(finish: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(finish)
    def finish_requests(self: Any, scheduler_output: Any) -> None:
        finish(self, scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self.headguard.close(request_id)

    return finish_requests


def _requests_come(add: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(add)
    def add_requests(self: Any, scheduler_output: Any) -> None:
        add(self, scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            if not self.headguard.knows(new.req_id):  # else it was preempted
                request_comes(self, new.req_id, new.prompt_len, new.lora_request, new.sampling_params)

    return add_requests


def _planned(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(prepare)
    def prepare_attn(self: Any, input_batch: Any) -> Any:
        blocks, slots = prepare(self, input_batch)
        rows = {request_id: row for row, request_id in enumerate(input_batch.req_ids)}
        computed, starts = input_batch.num_computed_tokens_np, input_batch.query_start_loc_np
        self.headguard.plan(rows, computed, starts, blocks[0][: input_batch.num_reqs])
        return blocks, slots

    return prepare_attn


def _before_sampling(sample: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample)
    def with_logits(self: Any, *args: Any, **named: Any) -> Any:
        compute = self.model.compute_logits

        def compute_logits(*inputs: Any, **more: Any) -> Any:
            logits = compute(*inputs, **more)
            self.headguard.before_sampling(logits)
            return logits

        self.model.compute_logits = compute_logits
        try:
            return sample(self, *args, **named)
        finally:
            del self.model.compute_logits

    return with_logits


def _notes_leave(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample_tokens)
    def with_step_notes(self: Any, grammar_output: Any) -> Any:
        output = sample_tokens(self, grammar_output)
        if output is None:
            return None
        fetch = output.get_output

        def get_output() -> Any:
            fetched = fetch()
            notes_leave(self, fetched)
            return fetched

        output.get_output = get_output
        return output

    return with_step_notes


AROUND: Mapping[str, Around] = MappingProxyType(
    {
        "initialize_kv_cache": probe_made,
        "finish_requests": _requests_go,
        "add_requests": _requests_come,
        "prepare_attn": _planned,
        "sample": _before_sampling,
        "sample_tokens": _notes_leave,
    }
)
