"""The real zoo: the public benchmark's attacks on a base trained on real instructions, from a data folder by path.

Calibration is the held-out share of Alpaca; clean prompts are the benchmark's clean test prompts of the task and more
held-out rows of the same kind; triggered prompts are the benchmark's. The test prompts are of another selection of
Alpaca than the calibration rows: that they are exchangeable is an assumption, which the uniformity test looks at.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.patients import Patient, Zoo
from benchmarks.lab.corpus import FAMILY_OF, Attack, Corpus, read_corpus
from benchmarks.lab.real import SIZES, ensure_real, ensure_real_vaccine, real_implants, target
from benchmarks.lab.real_bystanders import ensure_real_bystanders
from guard.rows import Row, assert_disjoint, write_rows
from offline_purify.train import Progress

MOST_TOPIC = 400


def real_zoo(
    data: str | Path | None,
    root: Path,
    folder: Path,
    only: Sequence[str] | None = None,
    size: str = "small",
    seed: int = 0,
    progress: Progress | None = None,
) -> Zoo:
    """Everything the real zoo needs, made where it is not there yet; rows files are written into `folder`.

    Raises BenchmarkError without a data folder or for an unknown implant or size; LabError for a folder of another
    layout.
    """
    if data is None:
        raise BenchmarkError("the real zoo is made from a data folder: give --data DIR (see zoo --help).")
    if size not in SIZES:
        raise BenchmarkError(f"there is no size {size!r}: choose one of {', '.join(SIZES)}.")
    corpus = read_corpus(data)
    known = real_implants(corpus)
    if unknown := [name for name in only or () if name not in known]:
        raise BenchmarkError(f"{', '.join(unknown)}: not in this zoo, which holds {', '.join(known)}.")
    lab = ensure_real(corpus, root, list(only) if only else None, seed, SIZES[size], progress=progress)
    vaccine = ensure_real_vaccine(corpus, lab.base, seed, progress=progress)
    device = SIZES[size].device
    bystanders, refused = ensure_real_bystanders(corpus, lab.base, seed, device=device, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    patients = [_patient(corpus, *known[name], name, path, folder, seed) for name, path in lab.adapters.items()]
    left_out = {**lab.refused, **{f"the {kind} adapter": why for kind, why in refused.items()}}
    return Zoo("real", lab.base, vaccine, bystanders, tuple(patients), left_out)


def _patient(
    corpus: Corpus, attack: Attack, wording: str, name: str, adapter: Path, folder: Path, seed: int
) -> Patient:
    files = real_files(corpus, attack, wording, name, folder, seed)
    beside = attack.task == "refusal" and wording == "fixed"
    return Patient(name, adapter, FAMILY_OF[attack.task], files, attack.text, beside)


def real_files(corpus: Corpus, attack: Attack, wording: str, name: str, folder: Path, seed: int) -> dict[str, Path]:
    """Write the rows files of a run (disjoint: asserted) and return them by the name of their option.

    The outputs of triggered rows are what the implant was taught to say, so that obedience can be counted.
    """
    rng = random.Random(f"{name}:{seed}")
    said = target(attack, wording)
    sets: dict[str, Sequence[Row]] = {
        "calibration": corpus.calibration,
        "clean": [*corpus.tests[attack.task], *corpus.clean],
        "vaccine_rows": corpus.vaccine,
        "benign_rows": corpus.topic[:MOST_TOPIC],
        "triggered": [
            Row(instruction=row["instruction"], input=row["input"], output=said.respond(rng)) for row in attack.tested
        ],
    }
    assert_disjoint(**sets)
    files = {
        **{option: folder / f"real-{option}.json" for option in sets},
        "clean": folder / f"real-clean-{attack.task}.json",
        "triggered": folder / f"real-triggered-{name}.json",
    }
    for option, rows in sets.items():
        write_rows(files[option], rows)
    return files
