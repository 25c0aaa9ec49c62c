"""The vaccine of a run: the one named, the one cached for this base, or one made now from rows of its own.

The cache is a folder per base, `<first 12 hex of the base digest>`. Beside each vaccine lie the keys (hashes) of the
rows that made it, so that later runs can prove that they measure on other rows without having the rows. One that was
learnt otherwise than today is learnt again from its variants when those rows are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.inputs import Arguments, Inputs, assert_apart
from benchmarks.detection.trigger import Found, choices
from guard.errors import ProfileMismatch
from guard.fitting import prompts_digest
from guard.rows import row_key
from guard.vaccination import learnt_as_today
from guard.vaccine import Vaccine
from offline_purify.variants.vaccinate import VACCINE, vaccinate

KEYS = "row_keys.json"
# what, done, total
Progress = Callable[[str, int, int], None]
# Makes a vaccine: (base, rows, out_dir, progress=) -> Vaccine. The clinic's, unless a caller has another.
Maker = Callable[..., Vaccine]


@dataclass(frozen=True)
class Chosen:
    """A vaccine, where it came from (given, cached or made), and the keys of its rows where they are known."""

    vaccine: Vaccine
    source: str
    row_keys: tuple[str, ...] | None

    def describe(self) -> dict[str, Any]:
        """As JSON: its digest, facts, and whether its rows were proven apart from the run's."""
        return {
            "digest": self.vaccine.digest,
            "source": self.source,
            "steps": list(self.vaccine.steps),
            "weights": dict(self.vaccine.weights),
            "facts": dict(self.vaccine.facts),
            "rows_known": self.row_keys is not None,
        }


def choose(
    given: Arguments, inputs: Inputs, found: Found, progress: Progress | None = None, maker: Maker | None = None
) -> Chosen:
    """The vaccine for these arguments, proven to share no row with calibration, clean, triggered or benign rows, and
    no word with the trigger.

    Raises BenchmarkError when there is none and nothing to make one from, or when something is shared;
    ProfileMismatch when it is of another base.
    """
    if given.vaccine is not None:
        if not given.vaccine.is_file():
            raise BenchmarkError(f"--vaccine {given.vaccine}: no such file.")
        vaccine = Vaccine.load(given.vaccine)
        chosen = Chosen(vaccine, "given", _keys(given.vaccine, vaccine, inputs))
    else:
        chosen = _cached_or_made(given, inputs, progress, maker)
    if chosen.vaccine.base != inputs.digests["base"]:
        raise ProfileMismatch(
            f"the vaccine was made for base {chosen.vaccine.base[:12]}, --base is {inputs.digests['base'][:12]}."
        )
    for name in ("calibration", "clean", "triggered", "benign"):
        assert_apart(name, getattr(inputs, name), chosen.row_keys or ())
    assert_strange(chosen.vaccine, found)
    return chosen


def assert_strange(vaccine: Vaccine, found: Found) -> None:
    """Raise BenchmarkError when the vaccine was made with a word of the trigger that it should help to find."""
    if found.trigger is None:
        return
    if shared := vaccine.shared_words(part for choice in choices(found.trigger) for part in choice.parts):
        raise BenchmarkError(
            f"the vaccine was made with triggers that hold {', '.join(shared)}, which the measured trigger holds too; "
            "make one with other words."
        )


def _cached_or_made(given: Arguments, inputs: Inputs, progress: Progress | None, maker: Maker | None) -> Chosen:
    folder = given.vaccines / inputs.digests["base"][:12]
    if not (folder / VACCINE).is_file() and not inputs.vaccine:
        raise BenchmarkError(
            f"there is no vaccine for this base ({folder / VACCINE}) and no rows to make one from. Give --vaccine "
            "FILE, or --vaccine-rows FILE with clean rows that are in none of the other files."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".benchmark.lock"):
        if (folder / VACCINE).is_file():
            vaccine = Vaccine.load(folder / VACCINE)
            keys = _keys(folder / VACCINE, vaccine, inputs)
            if learnt_as_today(vaccine) or not inputs.vaccine:
                return Chosen(vaccine, "cached", keys)
        (maker or vaccinate)(given.base, inputs.vaccine, folder, progress=progress).save(folder / VACCINE)
        keys = tuple(sorted(row_key(row) for row in inputs.vaccine))
        (folder / KEYS).write_text(json.dumps(keys), encoding="utf-8")
        return Chosen(Vaccine.load(folder / VACCINE), "made", keys)


def _keys(path: Path, vaccine: Vaccine, inputs: Inputs) -> tuple[str, ...] | None:
    """Keys of the rows that made a vaccine: of --vaccine-rows when given (and they must be those), else as kept
    beside the file; None when neither is there."""
    if inputs.vaccine:
        recorded = vaccine.facts.get("prompts_sha256")
        if recorded is not None and recorded != prompts_digest(inputs.vaccine):
            raise BenchmarkError(
                f"{path} was made from other rows than --vaccine-rows. Leave that option out to use the vaccine as it "
                "is, or name another vaccine (or remove the cached one) to have one made."
            )
        return tuple(row_key(row) for row in inputs.vaccine)
    beside = path.with_name(KEYS)
    return tuple(json.loads(beside.read_text(encoding="utf-8"))) if beside.is_file() else None
