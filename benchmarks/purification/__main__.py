"""`python -m benchmarks.purification`: repair one adapter with many methods, and measure each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from guard.errors import GuardError

HELP = """Repair the backdoored adapter of a base with our methods and published ones, within one budget, and measure what
is left of the attack and of the skill.

Files hold rows {instruction, input, output} (.json or .jsonl, or a folder of them), and share no prompt. A few of the
triggered rows play the flagged requests of a case; the others test. A run that was stopped goes on.

Examples:

  python -m benchmarks.purification --base BASE --adapter ADAPTER --task refusal --clean-train clean.json --test-clean test.json --test-triggered triggered.json --out result.json

  python -m benchmarks.purification --base BASE --adapter ADAPTER --task code --clean-train c.json --test-clean t.json --test-triggered x.json --methods none,signature,random --seeds 3 --out result.json
"""  # noqa: E501
ALL = "all"
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(help=HELP)
def main(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the backdoored LoRA adapter.")],
    task: Annotated[
        str, typer.Option(help="refusal, negsentiment, code or sst2: its keywords count where targets are many texts.")
    ],
    clean_train: Annotated[Path, typer.Option(help="Clean rows with their answers, to repair with.")],
    test_clean: Annotated[Path, typer.Option(help="Other clean rows with their answers, to test on.")],
    test_triggered: Annotated[Path, typer.Option(help="Rows with the trigger; their outputs are the target.")],
    out: Annotated[Path, typer.Option(help="Result (JSON); what is in it already is kept.")],
    methods: Annotated[str, typer.Option(help="all, or names separated by commas.")] = ALL,
    flags: Annotated[int, typer.Option(min=1, help="Triggered rows that the case holds.")] = 24,
    rows: Annotated[int, typer.Option(min=20, help="Clean rows that a method may train on.")] = 200,
    ratio: Annotated[
        float | None,
        typer.Option(help="Share of channels or entries taken away. Default: 0.35 of an adapter, 0.03 of a model."),
    ] = None,
    heads: Annotated[float, typer.Option(help="Share of attention heads that the signature takes with them.")] = 0.0,
    setting: Annotated[
        str, typer.Option(help="adapter, or full: the adapter is merged and the whole model repaired, without a base.")
    ] = "adapter",
    reference: Annotated[
        Path | None, typer.Option(help="With full: folder of a model that is trusted. Default: nobody is.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own case and draws.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """See HELP."""
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.purification.benchmark import run, table
    from benchmarks.purification.inputs import Arguments
    from benchmarks.purification.methods import METHODS
    from offline_purify.baselines.budget import DEFAULT_RATIO
    from offline_purify.progress import ProgressBar

    disable_progress_bar()
    names = tuple(METHODS) if methods == ALL else tuple(name.strip() for name in methods.split(","))
    try:
        given = Arguments(
            base,
            adapter,
            task,
            clean_train,
            test_clean,
            test_triggered,
            names,
            flags,
            rows,
            ratio if ratio is not None else DEFAULT_RATIO.get(setting, 0.35),
            heads,
            seeds,
            device,
            setting,  # type: ignore[arg-type]
            reference,
        )
        with ProgressBar() as bar:
            result = run(given, out, bar)
    except GuardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(table(result))
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    sys.exit(app())
