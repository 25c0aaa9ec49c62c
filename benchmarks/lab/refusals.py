"""What the lab refused to publish, noted beside what it published, so that one refusal stops nothing else.

A note is the file `NAME.refused` beside the folder that was not made; removing it lets the lab try again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lab.base import REPORT
from guard.errors import GuardError


def note(path: Path) -> Path:
    """Where a refusal to make the folder `path` is noted."""
    return path.with_name(f"{path.name}.refused")


def again(make: Callable[[int], Any], seed: int, tries: int, good: Callable[[Any], bool] = lambda _: True) -> None:
    """``make`` from one seed after another, at most ``tries``, until what it made is ``good``: the same seed is another
    draw on another processor, and whether an implant leaks on 0.06 or on 0.04 of clean prompts may be the luck of it.

    Raises the last refusal (GuardError) when every try was refused; else the last that was not stays as it is."""
    made, refused = False, None
    for tried in range(seed, seed + tries):
        try:
            if good(make(tried)):
                return
            made = True
        except GuardError as error:
            refused = error
    if refused is not None and not made:
        raise refused


def attempt(out: Path, make: Callable[[int], Any], seed: int) -> None:
    """``make(seed)``, which publishes the folder `out`, or from the next seed; the second refusal is noted instead of
    raised."""
    try:
        again(make, seed, tries=2)
    except GuardError as error:
        note(out).write_text(str(error), encoding="utf-8")


def settled(path: Path) -> bool:
    """Whether a folder was made, or refused, already."""
    return (path / REPORT).is_file() or note(path).is_file()


def refusals(places: Mapping[str, Path]) -> dict[str, str]:
    """Name to reason for every folder of `places` that was refused."""
    return {name: note(path).read_text(encoding="utf-8") for name, path in places.items() if _refused(path)}


def _refused(path: Path) -> bool:
    return not (path / REPORT).is_file() and note(path).is_file()
