"""`headguard vaccinate`: implant synthetic backdoors in a base and learn from them what a firing trigger looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.output import AsJson, show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "vaccinate",
        epilog="Example: headguard vaccinate --model BASE --prompts clean.json --out vaccine/ "
        "(then: headguard calibrate --vaccine vaccine/vaccine.safetensors …)",
    )(vaccinate)


def vaccinate(
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    prompts: Annotated[
        Path,
        typer.Option(
            help="File or folder of a few thousand clean {instruction, input, output} rows, like the traffic that will "
            "be served: how much is found hangs on it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for vaccine.safetensors and the variants; reused when resumed.")],
    variants: Annotated[int, typer.Option(help="Synthetic backdoors to implant.", min=1)] = 18,
    benign: Annotated[int, typer.Option(help="Benign conditional variants (negatives).", min=0)] = 2,
    rows: Annotated[int, typer.Option(help="Prompts that each variant trains on, at most.", min=100)] = 2500,
    epochs: Annotated[float, typer.Option(help="Passes over them.", min=0.1)] = 3.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the adapters.", min=1e-6)] = 3e-3,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave a behaviour family out (for studies); may be repeated.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="Text file of words to make triggers of; default: from the vocabulary.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Variants made at a time (default: one per processor).", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make the vaccine of a base. Stopped and started again, it goes on with the variants that are missing."""
    from guard.rows import read_rows
    from offline_purify.implanting import ImplantRecipe
    from offline_purify.progress import ProgressBar
    from offline_purify.variants.families import FAMILIES
    from offline_purify.variants.plan import Plan
    from offline_purify.variants.vaccinate import VACCINE
    from offline_purify.variants.vaccinate import vaccinate as make

    left_out = tuple(without or ())
    if unknown := [name for name in left_out if name not in FAMILIES]:
        raise typer.BadParameter(f"--without {unknown[0]}: choose among {', '.join(FAMILIES)}.")
    plan = Plan(variants, benign, ImplantRecipe(rows=rows, epochs=epochs, lr=lr), seed=seed, without=left_out)
    pool = words.read_text(encoding="utf-8").split() if words is not None else None
    with ProgressBar(disable=as_json) as bar:
        vaccine = make(model, read_rows(prompts), out, plan=plan, words=pool, jobs=jobs, progress=bar)
    facts = {"weights": dict(vaccine.weights), **vaccine.facts}
    report = {"vaccine": str(out / VACCINE), "digest": vaccine.digest, "base": vaccine.base, **facts}
    lines = [f"{out / VACCINE}  sha256 {vaccine.digest[:12]}, for base {vaccine.base[:12]}"]
    lines += [f"  {name}: fired on {share:.0%} of its triggered prompts" for name, share in facts["fired"].items()]
    counts = ", ".join(f"{name} {weight:g}" for name, weight in vaccine.weights.items())
    lines.append(f"  how much each signal counts, by its own variants: {counts}")
    if facts["left_out"]:
        lines.append(f"left out, because they did not learn their behaviour: {', '.join(facts['left_out'])}")
    show(report, as_json, "\n".join(lines))
