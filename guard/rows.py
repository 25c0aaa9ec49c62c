"""Rows of {instruction, input, output}: the one data format of the project, and the proof that splits do not overlap.

Calibration, training and evaluation sets must share nothing, or every figure is worthless. Rows are compared by a
normalised hash (case, spacing and punctuation at the ends do not count), so that a reformatted copy is still a copy.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TypedDict

from guard.errors import RowsError
from guard.identity import file_digest


class Row(TypedDict):
    """One instruction with an optional input and its clean answer; all text."""

    instruction: str
    input: str
    output: str


def _row(entry: object, where: str) -> Row:
    if not isinstance(entry, dict) or not isinstance(entry.get("instruction"), str):
        raise RowsError(f"{where}: expected an object with a text 'instruction' (and 'input', 'output').")
    texts = {key: entry.get(key) or "" for key in ("input", "output")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise RowsError(f"{where}: '{key}' must be text, found {type(text).__name__}.")
    return Row(instruction=entry["instruction"], input=texts["input"], output=texts["output"])


def _read_file(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RowsError(f"{path}: cannot be read as JSON rows: {error}") from error
    if not isinstance(entries, list):
        raise RowsError(f"{path}: expected a JSON list of rows, found {type(entries).__name__}.")
    return [_row(entry, f"{path}, row {number}") for number, entry in enumerate(entries)]


def read_rows(path: str | Path) -> list[Row]:
    """Rows of one ``.json``/``.jsonl`` file, or of all such files of a folder in name order.

    Raises RowsError naming the file and row when something is not a row, or when there is none.
    """
    rows = [row for file in _files(Path(path)) for row in _read_file(file)]
    if not rows:
        raise RowsError(f"{path}: holds no rows ({{instruction, input, output}} in .json or .jsonl files).")
    return rows


def rows_digest(path: str | Path) -> str:
    """SHA-256 (64 hex) of a file of rows; of a folder, over the digests of its files in name order. Raises RowsError
    when there is neither."""
    path = Path(path)
    digests = [file_digest(file) for file in _files(path)]
    return digests[0] if path.is_file() else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl"))
    if not path.is_file():
        raise RowsError(f"{path}: no such file or folder.")
    return [path]


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as one JSON list (UTF-8), the format that read_rows and the public benchmark use."""
    Path(path).write_text(json.dumps(list(rows), ensure_ascii=False, indent=0), encoding="utf-8")


def row_key(row: Row) -> str:
    """Hash (hex) of what is asked, blind to case, spacing and closing punctuation. The answer does not count."""
    asked = f"{row['instruction']} {row['input']}"
    return hashlib.sha256(re.sub(r"\s+", " ", asked).strip(" .!?").lower().encode()).hexdigest()


def assert_disjoint(**named: Sequence[Row]) -> None:
    """Raise RowsError, naming both lists and the number of shared rows, unless all lists are pairwise disjoint."""
    keys: Mapping[str, set[str]] = {name: {row_key(row) for row in rows} for name, rows in named.items()}
    for (left, left_keys), (right, right_keys) in combinations(keys.items(), 2):
        if shared := left_keys & right_keys:
            raise RowsError(f"'{left}' and '{right}' share {len(shared)} rows; they must have none in common.")


def split(rows: Sequence[Row], fractions: Sequence[float], seed: int) -> list[list[Row]]:
    """Drop repeated rows, shuffle by ``seed``, cut into ``len(fractions)`` disjoint parts (they sum to <= 1)."""
    if any(f <= 0 for f in fractions) or sum(fractions) > 1 + 1e-9:
        raise RowsError(f"fractions must be positive and sum to at most 1, got {list(fractions)}.")
    unique = list({row_key(row): row for row in rows}.values())
    random.Random(seed).shuffle(unique)
    bounds = [round(len(unique) * sum(fractions[: i + 1])) for i in range(len(fractions))]
    return [unique[start:end] for start, end in zip([0, *bounds], bounds, strict=False)]
