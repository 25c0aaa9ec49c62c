"""The threads torch computes with, for compiled loops that are not torch's.

A second pool of threads next to torch's would be slower than none: an idle OpenMP thread spins on its core for
milliseconds, waiting for the next parallel region of its own pool, and vLLM pins both pools to the same cores. (numba's
OpenMP layer links another libgomp than torch does, so it is such a second pool.) So a team is started in the very
OpenMP library that torch uses, by the entry point that compilers use for `#pragma omp parallel`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

_Parallel = Callable[[int, int, int, int], None]


def run_team(function: int, data: int, threads: int) -> None:
    """Runs the C function `void f(void *)` at address `function` with `data`, on this thread and threads - 1 others.

    It returns when all are done. With one thread, or without OpenMP, this thread does it alone, so f must share the
    work out by itself (tasks taken from a counter), whatever the size of the team. The GIL is released meanwhile.
    """
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        _alone(function)(data)
    else:
        parallel(function, data, threads, 0)


@functools.cache
def _alone(function: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


@functools.cache
def _parallel() -> _Parallel | None:
    """GOMP_parallel of a preloaded OpenMP library (vLLM preloads one), else of the one torch was linked with."""
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            parallel = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel  # type: ignore[no-any-return]
    return None
