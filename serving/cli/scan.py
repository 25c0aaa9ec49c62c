"""`headguard scan`: look for a backdoor in an adapter before it is admitted, and say what that can and cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.output import AsJson, Failure, show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "scan",
        epilog="Example: headguard scan my-lora --model BASE --prompts clean.json --vaccine vaccine.safetensors "
        "--out report.json",
    )(scan)


def scan(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    prompts: Annotated[Path, typer.Option(help="File or folder of clean {instruction, input, output} rows.")],
    vaccine: Annotated[
        Path | None, typer.Option(help="Vaccine of this base (.safetensors, from `headguard vaccinate`).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the report (.json).")] = None,
    words: Annotated[Path | None, typer.Option(help="Words and phrases to try as well, one a line.")] = None,
    stimuli: Annotated[int, typer.Option(help="Stimuli of each kind.", min=1)] = 160,
    alpha: Annotated[float, typer.Option(help="False-alarm rate of the guard on clean prompts.", min=1e-9, max=0.5)] = (
        0.01
    ),
    limit: Annotated[int | None, typer.Option(help="Use at most so many prompts.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the halves and of the stimuli.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Calibrate an adapter on half of the clean prompts and probe it with the rest and with foreign words.

    Rare words of the tokenizer, made-up words, phrases, pairs and bundles of words are put into clean prompts. The
    verdict is "nothing found" or "suspicious", with the words that did it; the exit code is 0 either way. "Nothing
    found" does not mean harmless: a trigger that was not tried cannot be excluded.
    """
    from guard.rows import read_rows
    from guard.vaccine import Vaccine
    from offline_purify.findings import text
    from offline_purify.progress import ProgressBar
    from offline_purify.scan import ScanPlan
    from offline_purify.scan import scan as look

    rows = read_rows(prompts)[:limit]
    given = _lines(words) if words is not None else []
    plan = ScanPlan(per_kind=stimuli, alpha=alpha, seed=seed)
    with ProgressBar(disable=as_json) as bar:
        report = look(
            model,
            adapter,
            rows,
            vaccine=Vaccine.load(vaccine) if vaccine is not None else None,
            plan=plan,
            given=given,
            progress=bar,
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    show(report.model_dump(mode="json"), as_json, text(report))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: cannot be read as lines of text: {error}") from error
