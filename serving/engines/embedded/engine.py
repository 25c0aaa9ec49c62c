"""The embedded engine: continuous batching over a `Runner`, with the verdict computed while generating.

One worker thread does everything that touches the model:

    step():  admit → prefill → sample → observe → emit
                     decode  → sample → observe → emit

Requests come in through `submit` from asyncio and leave as events; adapter revisions come and go between steps. At a
checkpoint the bank is read and the detector asked before the token of that step is released, so a request that is
flagged (and is to be stopped) ends at that very step. What could not be measured is `unscored` with a reason, never
clean. A step that raises fails the requests in it and nothing else.
"""

from __future__ import annotations

import copy
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor

from guard.adapters import inspect_adapter
from guard.errors import AdapterRejected, GuardError, PromptTooLong
from guard.identity import adapter_digest, base_digest, parse_revision
from guard.probes.transformers.calibrate import ENGINE, served_key
from guard.probes.transformers.runner import Runner
from guard.profile import Profile
from guard.verdict import unscored
from serving.engines.embedded.advance import EngineFault, advance
from serving.engines.embedded.requests import Answer, Event, Failed, GenerateRequest, Job
from serving.engines.embedded.sampling import Choice, Sampler, choose
from serving.engines.embedded.text import Detokenizer, StopStrings
from serving.engines.revisions import RevisionBooks, load_profile
from serving.errors import BadRequest, Unavailable, from_guard

log = logging.getLogger(__name__)

# Prompt tokens (padding included) prefilled in one step: longer waits for running requests buy nothing beyond this.
_PREFILL_TOKENS = 4096


class EmbeddedEngine:
    """Serves one base and its revisions from this process. `start` it, `submit` to it, `close` it.

    base_dir: model folder; name: what clients call the base; profile: of the base; max_queue: requests that may wait
    beyond the `runner.max_slots` that run; runner: one already loaded over base_dir.
    """

    def __init__(
        self,
        base_dir: str | Path,
        name: str = "base",
        profile: str | Path | None = None,
        max_queue: int = 256,
        runner: Runner | None = None,
        **load: Any,
    ) -> None:
        self.base_dir, self.name, self.max_queue = Path(base_dir), name, max_queue
        self.runner = runner or Runner.load(base_dir, **load)
        self.tokenizer = self.runner.tokenizer
        self.digest = base_digest(base_dir)
        self.books = RevisionBooks(name)
        key = served_key(self.runner, self.digest, None)
        self.books.add(None, key, *load_profile(profile, key))
        self.steps = self.blind = 0
        # The worker decodes while the event loop encodes: each has its own tokenizer.
        self._decoder = copy.deepcopy(self.tokenizer)
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: dict[int, Job] = {}
        self._free = list(range(self.runner.max_slots))
        self._submitted = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="headguard-engine", daemon=True)

    # From any thread -------------------------------------------------------------------------------------------------

    def start(self) -> EmbeddedEngine:
        """Starts the worker thread."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends all requests with 503 and the worker with them."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the worker is there to do the work."""
        return self._thread.is_alive() and not self._closing

    def submit(self, request: GenerateRequest) -> Answer:
        """Queues a request; call it in a running asyncio loop and iterate the answer's events there.

        Raises NotFound (revision), BadRequest (prompt, length, alpha or window), Unavailable (queue full, engine
        closed).
        """
        limit = self._limit(request)
        try:
            detector, alpha, reason = self.books.hold(request.revision, request.watch)
        except GuardError as error:
            raise from_guard(error) from error
        try:
            track = detector.open(len(request.prompt)) if detector is not None else None
            verdict = (
                track.verdict
                if track is not None
                else unscored(reason or "no_profile", alpha=alpha, window=request.watch.window)
            )
            answer = Answer(lambda: self._leave(job))
            job = Job(
                id="",
                request=request,
                limit=limit,
                detector=detector,
                track=track,
                verdict=verdict,
                sampler=Sampler(request.sampling),
                detokenizer=Detokenizer(self._decoder),
                stops=StopStrings(request.stop),
                post=answer.post,
                settled=track is None or track.bucket is None,
            )
            with self._wake:
                if not self.alive:
                    raise Unavailable("the engine is not running.")
                if len(self._waiting) >= self.max_queue:
                    raise Unavailable(
                        f"the engine is overloaded: {len(self._waiting)} requests are waiting. Try again later.",
                        code="engine_overloaded",
                    )
                self._submitted += 1
                job.id = f"{request.revision or self.name}#{self._submitted}"
                self._waiting.append(job)
                self._wake.notify()
        except BaseException:
            self.books.release(request.revision)
            raise
        return answer

    def load(self, revision: str, folder: str | Path, profile: str | Path | None = None) -> dict[str, Any]:
        """Serves another revision; blocks until it is loaded. Loading what is loaded already only sets the profile.

        Raises AdapterRejected or ProfileMismatch, with nothing changed.
        """
        _, digits = parse_revision(revision)
        if revision in self.books:
            return self.books.entry(revision) if profile is None else self.books.set_profile(revision, profile)
        digest = inspect_adapter(folder, self.base_dir).digest
        if not digest.startswith(digits):
            raise AdapterRejected(f"the adapter's digest begins {digest[:12]}, so it is not revision {revision}.")
        key = served_key(self.runner, self.digest, digest)
        loaded = Profile.load(profile, key) if profile is not None else None

        def command() -> None:
            if revision not in self.books:
                self.runner.add_adapter(revision, folder, inspected=True)
                if adapter_digest(folder) != digest:
                    self.runner.remove_adapter(revision)
                    raise AdapterRejected(f"the files of {revision} changed while they were loaded.")
                self.books.add(revision, key, loaded, None)

        self._command(command)
        return self.books.entry(revision)

    def unload(self, revision: str, drain_s: float = 0.0) -> None:
        """Stops serving a revision, waiting up to drain_s seconds for its requests. Raises NotFound or Conflict."""
        self.books.remove(revision, lambda: self._command(lambda: self.runner.remove_adapter(revision)), drain_s)

    def status(self) -> dict[str, Any]:
        """The body of GET /guard/status."""
        return {
            "engine": ENGINE,
            "base": {"name": self.name, "digest": self.digest},
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "max_model_len": self.runner.max_len,
            "probe": {
                "attached": self.runner.probe and self.alive,
                "blind": self.blind,
                "heads": self.runner.shape.heads,
                "key": self.runner.probe_key(),
            },
            "steps": self.steps,
            "running": len(self._running),
            "waiting": len(self._waiting),
            "slots": self.runner.max_slots,
            "revisions": self.books.entries(),
        }

    def _limit(self, request: GenerateRequest) -> int:
        """Tokens the request may generate."""
        try:
            self.runner.check_prompt(request.prompt)
        except PromptTooLong as error:
            raise BadRequest(str(error), code="context_length_exceeded", param="prompt") from error
        except GuardError as error:
            raise BadRequest(str(error), code="invalid_request_error", param="prompt") from error
        fits = self.runner.max_len - len(request.prompt)
        if fits < 1 or (request.max_tokens or 0) > fits:
            raise BadRequest(
                f"This model's context is {self.runner.max_len} tokens; the prompt has {len(request.prompt)} and "
                f"{request.max_tokens or 1} are asked for.",
                code="context_length_exceeded",
                param="max_tokens" if fits >= 1 else "prompt",
            )
        return request.max_tokens or fits

    def _leave(self, job: Job) -> None:
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    def _command(self, call: Callable[[], Any]) -> Any:
        """Runs `call` in the worker between two steps and returns its result."""
        done: Future[Any] = Future()
        with self._wake:
            if not self.alive:
                raise Unavailable("the engine is not running.")
            self._commands.append((call, done))
            self._wake.notify()
        return done.result()

    # In the worker thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._commands or self._waiting or self._running):
                    self._wake.wait()
                if self._closing:
                    break
                commands, self._commands = self._commands, deque()
            for call, done in commands:
                try:
                    done.set_result(call())
                except Exception as error:
                    done.set_exception(error)
            self.step()
        for job in [*self._running.values(), *self._waiting]:
            self._end(job, [Failed(Unavailable("the engine was stopped."))])
        for _, done in self._commands:
            done.set_exception(Unavailable("the engine was stopped."))

    def step(self) -> None:
        """One turn of the loop: at most one prefill and one decode."""
        decoding = [job for job in list(self._running.values()) if not self._gone(job)]
        admitted = self._admit()
        if admitted:
            self._prefill(admitted)
        if decoding:
            self._decode(decoding)

    def _gone(self, job: Job) -> bool:
        if job.cancelled:
            self._end(job, [])
        return job.cancelled

    def _admit(self) -> list[Job]:
        admitted: list[Job] = []
        longest = 0
        with self._wake:
            self._waiting = deque(job for job in list(self._waiting) if not self._gone(job))
            while self._waiting and self._free:
                longest = max(longest, len(self._waiting[0].request.prompt))
                if admitted and longest * (len(admitted) + 1) > _PREFILL_TOKENS:
                    break
                job = self._waiting.popleft()
                job.slot = self._free.pop(0)
                self._running[job.slot] = job
                admitted.append(job)
        return admitted

    def _prefill(self, jobs: list[Job]) -> None:
        def forward() -> Tensor:
            return self.runner.prefill(
                [job.slot for job in jobs],
                [job.request.prompt for job in jobs],
                [job.request.revision for job in jobs],
                [job.watched for job in jobs],
            )

        try:
            choices = choose(forward(), [job.sampler for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs, error)
            else:  # Nothing has been sampled yet, so whoever is not at fault can still be served.
                for job in jobs:
                    self._prefill([job])
            return
        self._advance(jobs, choices)

    def _decode(self, jobs: list[Job]) -> None:
        try:
            logits = self.runner.decode(
                [job.slot for job in jobs],
                [job.tokens[-1] for job in jobs],
                [job.request.revision for job in jobs],
                [job.watched for job in jobs],
            )
            choices = choose(logits, [job.sampler for job in jobs])
        except Exception as error:
            self._fail(jobs, error)
            return
        self._advance(jobs, choices)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        # The message of an exception may quote its input; where it happened and to whom never does.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("step failed with %s for %s\n%s", type(error).__name__, [job.id for job in jobs], frames)
        fault = EngineFault(f"the engine failed at this request ({type(error).__name__}).")
        for job in jobs:
            self._end(job, [Failed(fault)])

    def _advance(self, jobs: Sequence[Job], choices: Sequence[Choice]) -> None:
        """Sample, observe, emit: takes each job over the step that has just been computed."""
        self.steps += 1
        for job, choice in zip(jobs, choices, strict=True):
            try:
                events, over = advance(job, choice, self.runner, self._decoder)
            except Exception as error:
                self._fail([job], error)
                continue
            if over:
                self._end(job, events)
            else:
                job.post(events)

    def _end(self, job: Job, events: list[Event]) -> None:
        """Frees what the job held and says its last words."""
        if job.over:
            return
        job.over = True
        self.blind += job.blind
        if job.slot >= 0:
            self.runner.free(job.slot)
            del self._running[job.slot]
            self._free.append(job.slot)
            self._free.sort()
        self.books.release(job.request.revision)
        if events:
            job.post(events)
