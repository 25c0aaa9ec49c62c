"""Between vLLM's API server and its engine: requests are given their watch, the scheduler's notes are taken out.

vLLM merges the outputs of a request whose reader is slow, keeps only the last for one that does not stream, and in
merging forgets all notes but the newest. So notes are taken from the engine's outputs before `OutputProcessor` sees
them: none is lost, whoever reads and however slowly. Every entry point of the server reaches the engine through
`generate`, so every request gets a watch here, whatever its sender wrote into its sampling parameters.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from guard.probes.vllm.scheduling import NOTES, STOP_REASON
from guard.watch import Watch
from serving.engines.annotations import with_text
from serving.engines.vllm.exchange import EXCHANGE, Exchange, Hold
from serving.engines.vllm.generation import Generation

# Under this key of the extra arguments a request carries the name of the call that it belongs to.
_CALL = "headguard_call"
RESERVED = (NOTES, _CALL)


@dataclass(eq=False)
class Call:
    """One call of `generate`: its sequences by index, its prompt [T_p], and the engine's ids of its requests."""

    exchange: Exchange
    generations: list[Generation]
    id: str = field(default_factory=lambda: uuid4().hex)
    prompt: Sequence[int] = ()
    requests: list[str] = field(default_factory=list)


class Tap:
    """Installed on one AsyncLLM. hold: takes hold of a revision for one request, raising what the books raise;
    default: the watch of requests that bring none; decoder: the tokenizer.
    """

    def __init__(self, client: Any, hold: Callable[[str | None, Watch], Hold], default: Watch, decoder: Any) -> None:
        self.default = default
        self._hold, self._decoder = hold, decoder
        self._calls: dict[str, Call] = {}
        self._by_request: dict[str, tuple[Call, Generation]] = {}
        processor = client.output_processor
        self._generate, client.generate = client.generate, self.generate
        self._add_request, processor.add_request = processor.add_request, self.add_request
        self._process_outputs, processor.process_outputs = processor.process_outputs, self.process_outputs

    @property
    def in_flight(self) -> int:
        """Sequences that the engine works on, or will."""
        return len(self._by_request)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **more: Any) -> AsyncGenerator[Any, None]:
        """`AsyncLLM.generate`, with the watch of the HTTP request on whose behalf it is called."""
        exchange = EXCHANGE.get() or Exchange(self.default)
        call = Call(exchange, [Generation(exchange.watch) for _ in range(max(1, sampling_params.n or 1))])
        exchange.generations.extend(call.generations)
        return self._run(call, prompt, copy.copy(sampling_params), request_id, more)

    async def _run(
        self, call: Call, prompt: Any, sampling_params: Any, request_id: str, more: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        lora, watch = more.get("lora_request"), call.exchange.watch
        revision = lora.lora_name if lora is not None else None
        hold = call.exchange.take_hold(revision) or self._hold(revision, watch)
        try:
            for generation in call.generations:
                generation.alpha, generation.detector = hold.alpha, hold.detector
            told: dict[str, Any] = {"window": watch.window, "alpha": hold.alpha, "stop": watch.stop}
            told["fail"] = "closed" if watch.fail_closed else "open"
            extra = {NOTES: json.dumps(told), _CALL: call.id}
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), **extra}
            self._calls[call.id] = call
            outputs = self._generate(prompt, sampling_params, request_id, **more)
            try:
                async for output in outputs:
                    self._see_off(call, output)
                    await call.exchange.flush()
                    yield output
            finally:
                await outputs.aclose()
        finally:
            self._calls.pop(call.id, None)
            for request in call.requests:
                self._by_request.pop(request, None)
            hold.release()

    def add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        """`OutputProcessor.add_request`, which knows the id under which the engine will speak of a sequence."""
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        call = self._calls.get(extra.get(_CALL, ""))
        if call is not None and request.request_id not in self._by_request:
            call.prompt = request.prompt_token_ids or ()
            call.requests.append(request.request_id)
            self._by_request[request.request_id] = call, call.generations[request_index]
        self._add_request(request, prompt, parent_req, request_index, queue)

    def process_outputs(self, engine_core_outputs: list[Any], *args: Any, **more: Any) -> Any:
        """`OutputProcessor.process_outputs`, after the notes have been taken out."""
        for output in engine_core_outputs:
            call, generation = self._by_request.get(output.request_id, (None, None))
            params = output.kv_transfer_params
            told = params.pop(NOTES, None) if params is not None else None
            if params is not None and not params:
                output.kv_transfer_params = None
            if call is None or generation is None:
                continue
            generation.tokens += len(output.new_token_ids)
            if output.finish_reason is not None and output.stop_reason == STOP_REASON:
                generation.stopped = True
            if told is not None:
                generation.hear(told.get("verdict"))
                if generation.verdict is not None:
                    generation.verdict = with_text(generation.verdict, call.prompt, self._decoder)
                call.exchange.note(told.get("check_seconds"))
        return self._process_outputs(engine_core_outputs, *args, **more)

    def _see_off(self, call: Call, output: Any) -> None:
        """Closes the verdict of every sequence that ends with this output."""
        for completion in output.outputs:
            generation = call.generations[completion.index]
            if completion.finish_reason is not None:
                if generation.stopped:
                    completion.finish_reason = "content_filter"
                generation.close()
        if output.finished:
            for generation in call.generations:
                generation.close()
        call.exchange.note()
