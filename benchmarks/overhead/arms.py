"""Engines in processes of their own, advanced step by step by whoever holds the other end of the pipe.

vLLM runs inside the process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): nothing happens between two steps, so that the steps
of several engines can be interleaved. A step's time is taken in its process, around the engine's own `step`.

Any engine can play any arm. Two processes with the same weights differ by a per cent in speed, wherever their memory
came to lie, so arms must not be tied to processes. An engine that plays "off" has vLLM's own functions put back.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from guard.probes.vllm.attach import PLACES
from guard.probes.vllm.measure import OfflineEngine
from guard.readings import Measurement

_PATIENCE_S = 10.0


class Arm(StrEnum):
    """off: vLLM as it comes; idle: the plugin attached, nobody watched; watched: every request is."""

    off = "off"
    idle = "idle"
    watched = "watched"


@dataclass(frozen=True)
class Step:
    """Seconds of one step of an engine, and of them those inside the guard's own functions."""

    seconds: float
    inside: float


class Engine:
    """The parent's end of one engine. Every call waits for its answer; an error over there is raised here."""

    def __init__(self, base: Path, dtype: str, options: Mapping[str, Any], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = (base, dtype, dict(options), threads)
        self._process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def measure(self, prompts: Sequence[Sequence[int]], steps: Sequence[int], tokens: int) -> Measurement:
        """See OfflineEngine."""
        return self._call("measure", prompts, steps, tokens)  # type: ignore[no-any-return]

    def play(self, arm: Arm, profile: Path) -> None:
        """Be that arm from now on."""
        self._call("play", arm, str(profile))

    def status(self) -> dict[str, Any]:
        """The worker's `headguard_status`."""
        return self._call("status")  # type: ignore[no-any-return]

    def add(self, prompts: Sequence[Sequence[int]], new: int, extra: dict[str, Any] | None) -> None:
        """Requests that answer with `new` tokens each, greedily; `step` works on them."""
        self._call("add", prompts, new, extra)

    def step(self) -> Step | None:
        """The engine's next step, None when nothing is left to do."""
        return self._call("step")  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(_PATIENCE_S)
        self._process.kill()

    def _call(self, name: str, *args: Any) -> Any:
        self._pipe.send((name, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("an engine's process died; its own output says why.") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


@contextmanager
def engines(base: Path, dtype: str, options: Mapping[str, Any], threads: int) -> Iterator[list[Engine]]:
    """One guarded engine for each arm."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # inherited: a process reads it when it loads torch
    started: list[Engine] = []
    try:
        for _ in Arm:
            started.append(Engine(base, dtype, options, threads))
        yield started
    finally:
        for engine in started:
            engine.close()


def _work(pipe: Connection, settings: tuple[Path, str, dict[str, Any], int]) -> None:
    base, dtype, options, threads = settings
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # as vLLM binds its workers; the same for all
    try:
        worker = _Worker(OfflineEngine(base, dtype, **options))
        pipe.send(None)
        while True:
            name, args = pipe.recv()
            pipe.send(getattr(worker, name)(*args))
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
        raise


class _Worker:
    def __init__(self, engine: OfflineEngine) -> None:
        self.engine = engine
        self.measure, self.status = engine.measure, engine.status
        self._guarded = [(owner, name, getattr(owner, name)) for owner, name in PLACES]
        self._added = 0
        self._inside = 0.0
        (probe,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.headguard)
        for name in ("open", "close", "plan", "look", "before_sampling", "after_sampling"):
            setattr(probe, name, self._timed(getattr(probe, name)))

    def play(self, arm: Arm, profile: str) -> None:
        for owner, name, function in self._guarded:
            setattr(owner, name, function.__wrapped__ if arm == Arm.off else function)
        self.engine.llm.collective_rpc("headguard_set_profile", args=("", profile if arm == Arm.watched else None))

    def add(self, prompts: Sequence[Sequence[int]], new: int, extra: dict[str, Any] | None) -> None:
        from vllm import SamplingParams

        for prompt in prompts:
            params = SamplingParams(
                temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=extra
            )
            self.engine.llm.llm_engine.add_request(str(self._added), {"prompt_token_ids": list(prompt)}, params)
            self._added += 1

    def step(self) -> Step | None:
        engine = self.engine.llm.llm_engine
        if not engine.has_unfinished_requests():
            return None
        self._inside = 0.0
        began = time.perf_counter()
        engine.step()
        return Step(time.perf_counter() - began, self._inside)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self._inside += time.perf_counter() - began

        return timed
