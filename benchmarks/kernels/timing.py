"""Times of things that run in turn, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles

import torch


def in_turn(parts: dict[str, Callable[[], object]], repeats: int, gpu: bool) -> Iterator[dict[str, float]]:
    """Runs all parts in order, `repeats` times after one unrecorded time, and yields each round's milliseconds."""
    for turn in range(repeats + 1):
        times = {}
        for name, part in parts.items():
            if gpu:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                part()
                end.record()
                end.synchronize()
                times[name] = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                part()
                times[name] = (time.perf_counter() - begin) * 1e3
        if turn:
            yield times


def spread(values: list[float]) -> dict[str, float | int]:
    """Median, tenth and ninetieth percentile, least, and how many."""
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"median": median(values), "p10": tenths[0], "p90": tenths[8], "min": min(values), "n": len(values)}


def bandwidth(device: str, mebibytes: int) -> dict[str, float | int]:
    """GB/s at which a sum reads `mebibytes` of float32 from memory; with as many threads as torch has."""
    data = torch.ones(mebibytes << 18, device=device)
    rounds = list(in_turn({"read": data.sum}, 15, device != "cpu"))
    return spread([data.nbytes / 1e6 / each["read"] for each in rounds])
