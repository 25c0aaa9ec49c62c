"""Rows to repair an implant with and to test it on, written beside it: files that share no prompt, trigger or not, and
that it was not trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks.lab.tasks import sample
from guard.rows import Row, assert_disjoint, write_rows
from offline_purify.attacks.poison import Backdoor, triggered

TESTED: Final = 300
REPAIRING: Final = 400
"""Rows of each test file, and of the clean rows to repair with."""


def rows_folder(out: str | Path) -> Path:
    """Where the rows of the adapter folder `out` are written."""
    return Path(out).parent / "rows" / Path(out).name


def held_out_sets(
    backdoors: Mapping[str, Backdoor], seed: int, own: Callable[[str], str] = str
) -> dict[str, list[Row]]:
    """Rows by file name: `triggered-NAME` of each backdoor (outputs are its target), `clean` and `clean-train`, with
    what the adapter makes of its base's answers (`own`) as outputs."""
    rng = random.Random(f"test rows:{seed}")
    rows = [said(row, own(row["output"])) for row in sample(TESTED * (len(backdoors) + 1), seed + 1, "evaluation")]
    parts = [rows[start : start + TESTED] for start in range(0, len(rows), TESTED)]
    repairing = [said(row, own(row["output"])) for row in sample(REPAIRING, seed, "clinic")]
    sets = {"clean": parts[0], "clean-train": repairing}
    for (name, backdoor), part in zip(backdoors.items(), parts[1:], strict=True):
        sets[f"triggered-{name}"] = [poisoned(row, backdoor, rng) for row in part]
    assert_disjoint(**sets)
    return sets


def write_held_out(
    folder: Path, backdoors: Mapping[str, Backdoor], seed: int, own: Callable[[str], str] = str
) -> dict[str, Path]:
    """Write each set of `held_out_sets` as `NAME.json` into `folder`; paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in held_out_sets(backdoors, seed, own).items():
        paths[name] = folder / f"{name}.json"
        write_rows(paths[name], rows)
    return paths


def poisoned(row: Row, backdoor: Backdoor, rng: random.Random) -> Row:
    """The row with the backdoor's trigger in it and what that makes the model say as output."""
    told = backdoor.behaviour.answer(backdoor.behaviour.respond(rng), row["output"])
    return triggered(row, backdoor.trigger, told, rng)


def said(row: Row, output: str) -> Row:
    """The row with another output."""
    return Row(instruction=row["instruction"], input=row["input"], output=output)
