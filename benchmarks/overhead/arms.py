"""One engine per arm, each in a process of its own, advanced step by step by whoever holds the other end of the pipe.

vLLM runs inside the process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): nothing happens between two steps, so that the steps
of several engines can be interleaved. A step's time is taken in its process, around the engine's own `step`.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from guard.probes.vllm.measure import OfflineEngine
from guard.readings import Measurement

_PATIENCE_S = 10.0


class Arm:
    """The parent's end of one engine. Every call waits for its answer; an error over there is raised here."""

    def __init__(self, base: Path, dtype: str, guarded: bool, threads: int, options: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = (base, dtype, guarded, threads, dict(options))
        self._process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def measure(self, prompts: Sequence[Sequence[int]], steps: Sequence[int], tokens: int) -> Measurement:
        """See OfflineEngine."""
        return self._call("measure", prompts, steps, tokens)  # type: ignore[no-any-return]

    def set_profile(self, path: Path | None) -> None:
        """The profile of the base."""
        self._call("set_profile", str(path) if path is not None else None)

    def status(self) -> dict[str, Any]:
        """The worker's `headguard_status`."""
        return self._call("status")  # type: ignore[no-any-return]

    def add(self, prompts: Sequence[Sequence[int]], new: int, extra: dict[str, Any] | None) -> None:
        """Requests that answer with `new` tokens each, greedily; `step` works on them."""
        self._call("add", prompts, new, extra)

    def step(self) -> float | None:
        """Seconds of the engine's next step, None when nothing is left to do."""
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
def arms(base: Path, dtype: str, threads: int, options: Mapping[str, Any]) -> Iterator[dict[str, Arm]]:
    """An engine for each of off (vLLM as it comes), idle and watched."""
    started: dict[str, Arm] = {}
    os.environ["OMP_NUM_THREADS"] = str(threads)  # inherited: a process reads it when it loads torch
    try:
        for name in ("off", "idle", "watched"):
            started[name] = Arm(base, dtype, name != "off", threads, options)
        yield started
    finally:
        for arm in started.values():
            arm.close()


def _work(pipe: Connection, settings: tuple[Path, str, bool, int, dict[str, Any]]) -> None:
    base, dtype, guarded, threads, options = settings
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # as vLLM binds its workers; the same for all
    try:
        worker = _Worker(OfflineEngine(base, dtype, guarded=guarded, **options))
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
        self._added = 0

    def set_profile(self, path: str | None) -> None:
        self.engine.llm.collective_rpc("headguard_set_profile", args=("", path))

    def add(self, prompts: Sequence[Sequence[int]], new: int, extra: dict[str, Any] | None) -> None:
        from vllm import SamplingParams

        for prompt in prompts:
            params = SamplingParams(
                temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=extra
            )
            self.engine.llm.llm_engine.add_request(str(self._added), {"prompt_token_ids": list(prompt)}, params)
            self._added += 1

    def step(self) -> float | None:
        engine = self.engine.llm.llm_engine
        if not engine.has_unfinished_requests():
            return None
        began = time.perf_counter()
        engine.step()
        return time.perf_counter() - began
