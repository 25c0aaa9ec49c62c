"""How much faster adapters are trained together than one by one: both sides in one run, turn by turn, as a ratio."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks.purification.errors import BenchmarkError
from guard.rows import read_rows
from offline_purify.bank import train_adapters
from offline_purify.implanting import load_base, with_lora
from offline_purify.intervals import Figure, bootstrap
from offline_purify.signature.twins import TwinConfig
from offline_purify.suspect import check_repairable
from offline_purify.train import Example, Progress, TrainConfig, encode_rows, pad_id_of, train


def measure_twins(
    base: Path, rows: Path, variants: int = 6, steps: int = 20, rounds: int = 5, progress: Progress | None = None
) -> dict[str, Any]:
    """Train ``variants`` adapters for a few steps each, together and one by one, ``rounds`` times in turn.

    Returns JSON: ``ratio`` (seconds one by one over seconds together, geometric mean over rounds with a bootstrap
    interval), the seconds of both, and what they were measured with. Raises BenchmarkError for too few rows.
    """
    config, family = TwinConfig(), check_repairable(base).family
    size = config.training.batch_size
    model, tokenizer = load_base(base)
    examples = encode_rows(tokenizer, read_rows(rows))
    if len(examples) < variants * size:
        raise BenchmarkError(f"{rows}: {len(examples)} rows; {variants} adapters need at least {variants * size}.")
    sets = [examples[k::variants][: steps * size] for k in range(variants)]
    least = min(map(len, sets))
    sets = [own[:least] for own in sets]
    targets = [name for name, _, _ in family.projections(model)]
    training = TrainConfig.of_steps(steps, lr=config.training.lr, batch_size=size)
    peft = with_lora(load_base(base)[0], base, config.rank, 0)
    sides: dict[str, Callable[[], None]] = {
        "together": lambda: _together(model, targets, sets, training, config.rank, pad_id_of(tokenizer)),
        "one by one": lambda: _one_by_one(peft, sets, training, pad_id_of(tokenizer)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):  # the first round warms both sides up
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - began)
        if progress is not None:
            progress("rounds", turn + 1, rounds + 1)
    ratios = [alone / both for alone, both in zip(seconds["one by one"], seconds["together"], strict=True)]
    spread: Figure | None = bootstrap([[float(r) for r in ratios]], lambda r: r.mean(-1))
    return {
        "ratio": geometric_mean(ratios),
        "interval": [spread.low, spread.high] if spread else None,
        "seconds": seconds,
        "variants": variants,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "rank": config.rank,
        "batch_size": size,
    }


def _together(
    model: Any, targets: list[str], sets: list[list[Example]], config: TrainConfig, rank: int, pad_id: int
) -> None:
    train_adapters(model, targets, sets, rank, 2.0, config, pad_id=pad_id, together=len(sets))


def _one_by_one(peft: Any, sets: list[list[Example]], config: TrainConfig, pad_id: int) -> None:
    lora = [p for name, p in peft.named_parameters() if "lora_" in name]
    for own in sets:
        train(peft, own, config, pad_id=pad_id, parameters=lora)
