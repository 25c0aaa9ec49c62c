"""What a worker recorded, as plain arrays on the way between processes: sums by step, one file per batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from guard.gram import Earlier, HeadSums
from guard.readings import Readings

Recorded = Mapping[int, Sequence[tuple[int, HeadSums, tuple[float, ...]]]]
"""Request to what was read of it: step, sums and log-probabilities (nats)."""


def arrays_of(recorded: Recorded) -> dict[str, np.ndarray]:
    """What a worker recorded as plain arrays: `STEP/{index,gram,sink,norms,logprobs,focus,focus_len}`,
    and of step 0 `earlier_{gram,sink,norms}`."""
    by_step: dict[int, list[tuple[int, HeadSums, tuple[float, ...]]]] = {}
    for index in sorted(recorded):
        for step, sums, logprobs in recorded[index]:
            by_step.setdefault(step, []).append((index, sums, logprobs))
    arrays: dict[str, np.ndarray] = {}
    for step, rows in by_step.items():
        layers, heads = rows[0][1].sink.shape
        kv_heads = rows[0][1].norms.shape[-1] // 2 - heads
        readings = Readings.together(step, (layers, heads, kv_heads), rows)
        arrays[f"{step}/index"] = readings.index
        arrays[f"{step}/gram"] = readings.gram.numpy()
        arrays[f"{step}/sink"] = readings.sink.numpy()
        arrays[f"{step}/norms"] = readings.norms.numpy()
        arrays[f"{step}/logprobs"] = readings.logprobs
        arrays[f"{step}/focus"] = np.concatenate(readings.focus)
        arrays[f"{step}/focus_len"] = np.asarray([len(focus) for focus in readings.focus], dtype=np.int64)
        if readings.earlier is not None:
            arrays |= {f"{step}/earlier_{name}": part.numpy() for name, part in readings.earlier._asdict().items()}
    return arrays


def readings_of(step: int, parts: Sequence[dict[str, np.ndarray]]) -> Readings:
    """The readings of one step in arrays that workers wrote, batch by batch."""
    found = [part for part in parts if f"{step}/index" in part]
    if not found:
        return Readings(step, np.zeros(0, dtype=np.int64), torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0),
                        torch.zeros(0, 0, 0), np.zeros((0, step + 1)), [])  # fmt: skip

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part[f"{step}/{name}"] for part in found])

    edges = np.cumsum(joined("focus_len"))[:-1]
    earlier = None
    if f"{step}/earlier_gram" in found[0]:
        earlier = Earlier(*(torch.from_numpy(joined(f"earlier_{name}")) for name in Earlier._fields))
    return Readings(
        step, joined("index"), torch.from_numpy(joined("gram")), torch.from_numpy(joined("sink")),
        torch.from_numpy(joined("norms")), joined("logprobs"), np.split(joined("focus"), edges), earlier=earlier,
    )  # fmt: skip
