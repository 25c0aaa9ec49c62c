"""`headguard purify`: repair an adapter or a model from flagged requests and clean rows, durably, without a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from serving.cli.output import AsJson, Failure, show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "purify",
        epilog="Example: headguard purify --model BASE --adapter LORA --flags flags.jsonl --clean clean/ --out repair/"
        "\n\nOf a whole model: headguard purify --model SUSPECT --flags flags.jsonl --clean clean/ --out repair/",
    )(purify)


def purify(
    model: Annotated[
        Path, typer.Option(help="Folder of the adapter's base or, without --adapter, of the suspicious model itself.")
    ],
    flags: Annotated[Path, typer.Option(help="Flagged requests (.jsonl), as a case exports them.")],
    clean: Annotated[Path, typer.Option(help="File or folder of clean {instruction, input, output} rows.")],
    out: Annotated[Path, typer.Option(help="Folder for the candidate, its profile and the report.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of the suspicious adapter; without one the whole model is repaired.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Who answers the flagged prompts rightly. For an adapter: 'base' (the default), or a folder of a good "
            "adapter. For a whole model: a folder of a trusted model, or of an adapter over the suspicious one; "
            "without it nobody is trusted, and the model's own answers without the trigger stand in."
        ),
    ] = None,
    stages: Annotated[str, typer.Option(help="Stages to run, in order.")] = "signature,heads,counter",
    name: Annotated[
        str | None, typer.Option(help="Name of the candidate's revision; 'adapter' or 'model' unless given.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="False-alarm rate the candidate's profile should support.")] = 0.05,
    vaccine: Annotated[
        Path | None, typer.Option(help="Vaccine of the adapter's base, for the candidate's profile.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Profile of the suspicious revision: does the guard see the trigger candidates?")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A threshold of the gate, such as accuracy_drop_max=0.02; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of splits and training.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a repaired candidate and its report. Killed and started again, it goes on at the step it was in.

    Exit code 1 when no candidate passed the gate.
    """
    from offline_purify import workflow
    from offline_purify.progress import ProgressBar
    from offline_purify.spec import RepairSpec

    given = {
        "base": model, "adapter": adapter, "flags": flags, "clean": clean, "out": out, "alpha": alpha, "seed": seed,
        "reference": reference, "vaccine": vaccine, "profile": profile, "gate": _thresholds(gate or []),
        "stages": tuple(stage.strip() for stage in stages.split(",") if stage.strip()),
    }  # fmt: skip
    if name is not None:
        given["name"] = name
    try:
        spec = RepairSpec.model_validate(given)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise Failure(f"this repair cannot be asked for: {'; '.join(wrong)}") from None
    out.mkdir(parents=True, exist_ok=True)
    with ProgressBar(disable=as_json) as bar:
        result = workflow.run(spec, f"sqlite:///{out.absolute() / 'workflow.sqlite'}", progress=bar)
    show(result.model_dump(mode="json"), as_json)
    if result.status != "offered":
        raise Failure(f"no candidate: {result.status}: {'; '.join(result.reasons) or 'see the report'}")


def _thresholds(given: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` by name; whether there is such a threshold is for the gate's settings to say."""
    if wrong := [text for text in given if not all(text.partition("="))]:
        raise Failure(f"--gate {wrong[0]}: expected NAME=VALUE, such as accuracy_drop_max=0.02.")
    return {name.strip(): value.strip() for name, _, value in (text.partition("=") for text in given)}
