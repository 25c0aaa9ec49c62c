"""What a run is given, read and checked before anything is measured: files of rows, folders, alpha, window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.detection.errors import BenchmarkError
from guard.identity import adapter_digest, base_digest
from guard.profile import NO_ADAPTER
from guard.rows import Row, assert_disjoint, read_rows, row_key, rows_digest
from guard.verdict import Window

LEAST_ROWS = 20
"""Fewer clean or triggered rows than this give shares that mean nothing."""


@dataclass(frozen=True)
class Arguments:
    """The options of one run; paths are files of rows unless they name a base, an adapter or a vaccine."""

    base: Path
    adapter: Path | None
    calibration: Path
    clean: Path
    triggered: Path
    vaccine: Path | None = None
    vaccine_rows: Path | None = None
    vaccines: Path = Path("build/vaccines")
    alpha: float = 0.01
    window: Window = 2
    trigger: str | None = None
    clean_adapter: Path | None = None
    benign_adapter: Path | None = None
    benign_rows: Path | None = None
    control_rows: int = 300
    seed: int = 0
    name: str = ""
    device: str = "cpu"
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise BenchmarkError(f"--alpha {self.alpha:g} is not a false-alarm rate: expected a number in (0, 1).")
        if (self.benign_adapter is None) != (self.benign_rows is None):
            raise BenchmarkError("--benign-adapter and --benign-rows belong together: give both or none.")
        if self.control_rows < LEAST_ROWS:
            raise BenchmarkError(f"--control-rows {self.control_rows}: expected at least {LEAST_ROWS}.")


@dataclass(frozen=True)
class Inputs:
    """The distinct rows of each file, how many were repeats, and a digest of everything that goes in."""

    calibration: list[Row]
    clean: list[Row]
    triggered: list[Row]
    benign: list[Row]
    vaccine: list[Row]
    repeated: dict[str, int]
    digests: dict[str, str]


def parse_window(text: str) -> Window:
    """``prefill``, ``all`` or a number of generated tokens. Raises BenchmarkError for anything else."""
    if text == "prefill":
        return "prefill"
    if text == "all":
        return "all"
    if text.isdecimal():
        return int(text)
    raise BenchmarkError(f"--window {text!r}: expected prefill, all, or a number of generated tokens.")


def read_inputs(given: Arguments) -> Inputs:
    """Read all files; raises GuardError (with the file's name) for what is no rows, shares rows, or is too small."""
    files = {
        "calibration": given.calibration,
        "clean": given.clean,
        "triggered": given.triggered,
        "benign": given.benign_rows,
        "vaccine": given.vaccine_rows,
    }
    rows: dict[str, list[Row]] = {}
    repeated: dict[str, int] = {}
    for name, path in files.items():
        found = read_rows(path) if path is not None else []
        rows[name] = list({row_key(row): row for row in found}.values())
        repeated[name] = len(found) - len(rows[name])
    assert_disjoint(**{name: those for name, those in rows.items() if those})
    for name in ("clean", "triggered"):
        if len(rows[name]) < LEAST_ROWS:
            raise BenchmarkError(
                f"{files[name]}: {len(rows[name])} distinct {name} rows; expected at least {LEAST_ROWS}."
            )
    digests = {name: rows_digest(path) for name, path in files.items() if path is not None}
    digests["base"] = base_digest(given.base)
    digests["adapter"] = _adapter(given.adapter)
    for name, folder in (("clean_adapter", given.clean_adapter), ("benign_adapter", given.benign_adapter)):
        if folder is not None:
            digests[name] = _adapter(folder)
    return Inputs(**rows, repeated={name: n for name, n in repeated.items() if n}, digests=digests)


def assert_apart(name: str, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Raise BenchmarkError when rows are among those, known by their keys alone, that made a vaccine."""
    shared = {row_key(row) for row in rows} & set(keys)
    if shared:
        raise BenchmarkError(
            f"'{name}' and the rows that made the vaccine share {len(shared)} rows; they must have none in common."
        )


def _adapter(folder: Path | None) -> str:
    return NO_ADAPTER if folder is None else adapter_digest(folder)
