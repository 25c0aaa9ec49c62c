"""What commands print: tables and lines for people, one JSON value for machines, progress on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]


class Failure(Exception):
    """The work failed; the message says why and what to do. Becomes exit code 1."""


def show(value: Any, as_json: bool, text: str | None = None) -> None:
    """Print ``value`` as JSON, or ``text`` (default: the value's fields, one a line)."""
    if as_json:
        print(json.dumps(value, indent=2, sort_keys=True, default=str))
    elif text is not None:
        print(text)
    else:
        for name, field in value.items():
            print(f"{name.replace('_', ' '):>20}  {_cell(name, field)}")


def table(rows: Iterable[Mapping[str, Any]], columns: list[str], as_json: bool, empty: str) -> None:
    """Print rows as a table of ``columns``, or all of them as JSON."""
    rows = list(rows)
    if as_json:
        print(json.dumps(rows, indent=2, sort_keys=True, default=str))
        return
    if not rows:
        print(empty)
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        grid.add_row(*[_cell(column, row.get(column)) for column in columns])
    console = Console()
    # A pipe has no width: whoever reads it wants whole lines.
    (console if console.is_terminal else Console(width=240)).print(grid)


def _cell(name: str, value: Any) -> str:
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, float) and (name == "at" or name.endswith("_at")):
        return datetime.fromtimestamp(value, UTC).isoformat(sep=" ", timespec="seconds")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(str(key), field)}" for key, field in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(name, field) for field in value)
    return str(value)


@contextmanager
def progress(what: str, as_json: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr as a callable (done, total); silent with ``--json``."""
    with tqdm(desc=what, total=0, disable=as_json, leave=True, unit="") as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """A spinner on stderr with the seconds that passed, turned by the callable; one plain line where there is no
    terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(what, soft_wrap=True)
    began = time.monotonic()
    with console.status(what) as status:
        yield lambda: status.update(f"{what} · {time.monotonic() - began:.0f} s")
