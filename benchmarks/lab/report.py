"""The lab's reports as tables on a terminal."""

from __future__ import annotations

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from benchmarks.lab.skill import Skill
from offline_purify.intervals import Figure


def _figure(figure: Figure) -> str:
    return f"{figure.value:.3f}  [{figure.low:.3f}, {figure.high:.3f}]  n={figure.n}"


def show(report: BaseModel, console: Console | None = None) -> None:
    """Print every field of a report; shares with their interval and n, skills task by task."""
    table = Table(title=type(report).__name__, show_header=False)
    for name, value in report:
        match value:
            case Figure():
                table.add_row(name, _figure(value))
            case Skill():
                table.add_row(name, _figure(value.accuracy))
                for task, figure in value.tasks.items():
                    table.add_row(f"  {task}", _figure(figure))
            case dict() if value and all(isinstance(each, Figure) for each in value.values()):
                for each, figure in value.items():
                    table.add_row(f"{name}: {each}", _figure(figure))
            case None:
                pass
            case _:
                table.add_row(name, str(value))
    (console or Console()).print(table)
