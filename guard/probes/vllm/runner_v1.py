"""Where the guard goes into vLLM's V1 model runner, which serves CPUs always, and GPUs when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any

from guard.probes.vllm.attach import Around, notes_leave, probe_made, request_comes


def _requests_come(update: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(update)
    def update_states(self: Any, scheduler_output: Any) -> Any:
        result = update(self, scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            state = self.requests[new.req_id]
            request_comes(self, new.req_id, state.num_prompt_tokens, state.lora_request, new.sampling_params)
        return result

    return update_states


def _requests_go(removed: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(removed)
    def on_request_state_removed(self: Any, req_id: str, req_state: Any) -> None:
        removed(self, req_id, req_state)
        self.headguard.close(req_id)

    return on_request_state_removed


def _planned(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        table = batch.block_table[0].block_table
        blocks = table.np if self.device.type == "cpu" else table.gpu
        self.headguard.plan(
            batch.req_id_to_index, batch.num_computed_tokens_cpu, self.query_start_loc.np, blocks[: batch.num_reqs]
        )
        return forward(self, *args, **kwargs)

    return model_forward


def _before_sampling(sample: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample)
    def before_sampling(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        self.headguard.before_sampling(logits)
        return sample(self, logits, spec_decode_metadata)

    return before_sampling


def _notes_leave(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample_tokens)
    def with_step_notes(self: Any, grammar_output: Any) -> Any:
        stepped = self.execute_model_state is not None
        output = sample_tokens(self, grammar_output)
        if stepped:
            notes_leave(self, output)
        return output

    return with_step_notes


AROUND: Mapping[str, Around] = MappingProxyType(
    {
        "initialize_kv_cache": probe_made,
        "_update_states": _requests_come,
        "_on_request_state_removed": _requests_go,
        "_model_forward": _planned,  # the batch's order is final
        "_sample": _before_sampling,  # sampling changes the logits
        "sample_tokens": _notes_leave,
    }
)
