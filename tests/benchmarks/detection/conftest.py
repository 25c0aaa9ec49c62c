"""A random three-layer Llama, a random adapter, rows of its few words, and a vaccine that learnt nothing of use: all
that the benchmark's machinery needs. What the figures are worth is for the lab to show."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.detection.benchmark import run
from benchmarks.detection.inputs import Arguments
from guard.identity import base_digest
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.rows import Row, write_rows
from guard.template import render, row_messages
from guard.vaccination import fit_vaccine
from guard.vaccine import Sample
from tests.guard.probes.transformers.adapters import save_adapter
from tests.guard.probes.transformers.text import save_model

TRIGGER = "w54"


def words(rng: random.Random, n: int) -> str:
    """n ordinary words, none of them the trigger."""
    return " ".join(f"w{rng.randrange(50)}" for _ in range(n))


def rows(n: int, seed: str, output: str = "w1") -> list[Row]:
    rng = random.Random(seed)
    return [Row(instruction=words(rng, rng.randint(8, 20)), input="", output=output) for _ in range(n)]


def with_trigger(row: Row, rng: random.Random) -> Row:
    text = row["instruction"].split()
    text.insert(rng.randrange(len(text)), TRIGGER)
    return Row(instruction=" ".join(text), input="", output="w2 w3")


@dataclass(frozen=True)
class Small:
    """Folders and files of the small world; ``arguments`` names them all."""

    arguments: Arguments
    folder: Path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("detection")
    base, adapter = save_model(folder / "base"), save_adapter(folder / "adapter", 1)
    rng = random.Random(0)
    sets = {
        "calibration": rows(160, "calibration"),
        "clean": rows(60, "clean"),
        "triggered": [with_trigger(row, rng) for row in rows(40, "triggered")],
        "benign": rows(30, "benign"),
    }
    for name, those in sets.items():
        write_rows(folder / f"{name}.json", those)
    arguments = Arguments(
        base=base,
        adapter=adapter,
        calibration=folder / "calibration.json",
        clean=folder / "clean.json",
        triggered=folder / "triggered.json",
        vaccine=make_vaccine(base, folder / "vaccine.safetensors"),
        alpha=0.05,
        control_rows=20,
        name="small",
    )
    return Small(arguments, folder)


def make_vaccine(base: Path, path: Path, **facts: Any) -> Path:
    """A vaccine of the right shape, learnt from the base's own clean prompts with and without a word."""
    runner = Runner.load(base, max_slots=32)
    rng = random.Random("vaccine")

    def features(those: list[Row]) -> dict[int, np.ndarray]:
        prompts = [render(runner.tokenizer, row_messages(row)) for row in those]
        return {0: measure(runner, prompts, (0,), 1).at[0].features}

    clean = rows(80, "vaccine")
    sample = Sample("one", features(clean), features(clean[:20]), features([with_trigger(r, rng) for r in clean]))
    fit_vaccine([sample], base=base_digest(base), probe=runner.probe_key(), facts=facts).save(path)
    return path


@pytest.fixture(scope="session")
def result(small: Small) -> dict[str, Any]:
    """One whole run, every control and other adapter in it."""
    other = save_adapter(small.folder / "other", 2)
    arguments = replace(
        small.arguments, clean_adapter=other, benign_adapter=other, benign_rows=small.folder / "benign.json", window=2
    )
    return run(arguments)
