"""What the guard changes in the engine core: the way of a verdict, and where the prefix cache ends.

A worker's notes ride on the output of the step (`ModelRunnerOutput.headguard`). Here, in the engine core, a request
whose note says stop is finished before the step's token is handed on, and every note leaves with the output of its
request, as `kv_transfer_params["headguard"]`: the one free-form field that an engine output has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

NOTES = "headguard"
STOP_REASON = "headguard"


def with_notes(update_from_output: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler.update_from_output`, obeying and delivering the notes in a step's output."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.request import RequestStatus

    @wraps(update_from_output)
    def update(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        notes: dict[str, dict[str, Any]] = getattr(model_runner_output, NOTES, None) or {}
        stopped = []
        for request_id, told in notes.items():
            request = self.requests.get(request_id)
            if told["stop"] and request is not None and not request.is_finished():
                # Finished before the step is taken in: its token is never appended, nor sent.
                request.resumable = False
                stopped.append((request, request.take_prefill_stats()))
        if stopped:
            self.finish_requests([request.request_id for request, _ in stopped], RequestStatus.FINISHED_STOPPED)
        outputs = update_from_output(self, scheduler_output, model_runner_output)
        for told_outputs in outputs.values() if notes else ():
            for output in told_outputs.outputs:
                if output.request_id in notes:
                    output.kv_transfer_params = {
                        **(output.kv_transfer_params or {}),
                        NOTES: _sent(notes[output.request_id]),
                    }
        for request, prefill in stopped:
            if prefill is not None:
                prefill.finalize(0)
            last = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=FinishReason.STOP,
                stop_reason=STOP_REASON,
                prefill_stats=prefill,
                kv_transfer_params={NOTES: _sent(notes[request.request_id])},
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(last)
        return outputs

    return update


def leaving_prompt_rows(find: Callable[..., Any]) -> Callable[..., Any]:
    """A coordinator's `find_longest_cache_hit`, ending early enough that the prompt's last few positions are computed:
    what comes out of the prefix cache has no queries to read."""
    from guard.gram import PROMPT_ROWS

    @wraps(find)
    def find_longest_cache_hit(self: Any, block_hashes: Any, max_cache_hit_length: int) -> Any:
        return find(self, block_hashes, max(max_cache_hit_length - PROMPT_ROWS + 1, 0))

    return find_longest_cache_hit


def _sent(told: dict[str, Any]) -> dict[str, Any]:
    return {"verdict": told["verdict"], "check_seconds": told["check_seconds"]}
