"""A result file that a stopped run goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.purification.errors import BenchmarkError
from offline_purify.steps import read_json


def begun(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What lies in ``out`` already, or an empty result. ``about``: what makes runs alike (format, settings, digests).

    Raises BenchmarkError when ``out`` holds results of another run.
    """
    if not out.is_file():
        return {**about, "seeds": {}}
    kept: dict[str, Any] = read_json(out)
    if different := [name for name, value in about.items() if kept.get(name) != value]:
        raise BenchmarkError(f"{out} holds results of another run ({', '.join(different)} differ): name another file.")
    return kept
