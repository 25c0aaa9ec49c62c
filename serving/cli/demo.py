"""`headguard demo`: the whole loop on this machine, from a trained lab model to a repaired adapter swapped in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.output import AsJson, show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", epilog="Example: headguard demo --out build/demo")(demo)


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for state, report and summary.json; what is there is replaced.")
    ] = Path("build/demo"),
    lab: Annotated[Path, typer.Option(help="Folder in which lab models are cached.")] = Path("build/lab"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Make the lab models again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a backdoored adapter, notice it, repair it, have it approved, swap it under load, measure again."""
    import logging

    from benchmarks.demo.story import run

    logging.getLogger("httpx").setLevel(logging.WARNING)
    summary = run(out, lab, fresh=fresh)
    if as_json:
        show(summary, True)
