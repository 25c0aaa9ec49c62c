"""`python -m benchmarks.purification`: repair one adapter with many methods, and measure each; `ablation` takes one
method apart, `skill` measures task accuracy with lm-eval."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from guard.errors import GuardError

HELP = """Repair the backdoored adapter of a base with our methods and published ones, within one budget, and measure what
is left of the attack and of the skill.

Files hold rows {instruction, input, output} (.json or .jsonl, or a folder of them), and share no prompt. A few of the
triggered rows play the flagged requests of a case; the others test. A run that was stopped goes on.

Examples:

  python -m benchmarks.purification --base BASE --adapter ADAPTER --task refusal --clean-train clean.json --test-clean test.json --test-triggered triggered.json --out result.json

  python -m benchmarks.purification --base BASE --adapter ADAPTER --task code --clean-train c.json --test-clean t.json --test-triggered x.json --methods none,signature,random --seeds 3 --out result.json

  python -m benchmarks.purification --base BASE --adapter ADAPTER --task refusal --clean-train c.json --test-clean t.json --test-triggered word.json --unflagged phrase.json --unflagged pair.json --out result.json

  python -m benchmarks.purification ablation ratio --base BASE --adapter ADAPTER --task refusal --clean-train c.json --test-clean t.json --test-triggered x.json --out ratio.json
"""  # noqa: E501
ABLATION_HELP = """Take one method apart: sanity (attention, MLP, blocks, shuffled channels), score (its terms), variants (how many),
ratio, heads-by-ratio, transfer (signatures of other adapters, --donor), steps (align alone, fine-tune alone, random
heads), alpha, tau, rate, counter (how hard counter-training trains).

Example:

  python -m benchmarks.purification ablation transfer --donor OTHER_ADAPTER --base BASE --adapter ADAPTER --task refusal --clean-train c.json --test-clean t.json --test-triggered x.json --out transfer.json
"""  # noqa: E501
TWINS_HELP = """Train adapters over one frozen base together and one by one, in turn, and give the ratio of the times.

Example:

  python -m benchmarks.purification twins --base BASE --rows clean.json
"""
SKILL_HELP = """Measure task accuracy with lm-eval (the extra lm-eval): the share of rows whose greedy answer is the row's output, case,
spacing and closing punctuation aside. Of a base on this machine, with or without an adapter, or through any
OpenAI-compatible chat endpoint, a guarded one too: answers that the guard stops are counted, and hardly ever right.

The endpoint's key is read from the environment (HEADGUARD_KEY). Nothing is fetched, and no prompt is logged or kept.

Examples:

  python -m benchmarks.purification skill --rows test.json --base BASE --adapter ADAPTER --out before.json

  python -m benchmarks.purification skill --rows test.json --base BASE --adapter REPAIRED --out after.json

  HEADGUARD_KEY=… python -m benchmarks.purification skill --rows test.json --url http://127.0.0.1:8000/v1 --model support --out served.json
"""  # noqa: E501
ALL = "all"
app = typer.Typer(
    help=HELP,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
REQUIRED = ("base", "adapter", "task", "clean_train", "test_clean", "test_triggered", "out")
Base = Annotated[Path | None, typer.Option(help="Folder of the base model.")]
Adapter = Annotated[Path | None, typer.Option(help="Folder of the backdoored LoRA adapter.")]
Task = Annotated[
    str | None,
    typer.Option(help="refusal, negsentiment, code or sst2: its keywords count where targets are many texts."),
]
CleanTrain = Annotated[Path | None, typer.Option(help="Clean rows with their answers, to repair with.")]
TestClean = Annotated[Path | None, typer.Option(help="Other clean rows with their answers, to test on.")]
TestTriggered = Annotated[Path | None, typer.Option(help="Rows with the trigger; their outputs are the target.")]
Out = Annotated[Path | None, typer.Option(help="Result (JSON); what is in it already is kept.")]
Unflagged = Annotated[
    list[Path] | None,
    typer.Option(help="Rows with a further trigger of the adapter, none of which the case holds; may be repeated."),
]
Flags = Annotated[int, typer.Option(min=1, help="Triggered rows that the case holds.")]
Rows = Annotated[int, typer.Option(min=20, help="Clean rows that a method may train on.")]
Ratio = Annotated[
    float | None,
    typer.Option(help="Share of channels or entries taken away. Default: 0.35 of an adapter, 0.03 of a model."),
]
Heads = Annotated[float, typer.Option(help="Share of attention heads that the signature takes with them.")]
Scope = Annotated[
    str,
    typer.Option(
        "--setting", help="adapter, or full: the adapter is merged and the whole model repaired, without a base."
    ),
]
Reference = Annotated[
    Path | None, typer.Option(help="With full: folder of a model that is trusted. Default: nobody is.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs, each with its own case and draws.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def _run(values: dict[str, Any], ablation: str | None = None) -> None:
    """Check that nothing is missing, run, print the table; what is refused becomes one line and exit code 1."""
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.purification.ablations import methods_of
    from benchmarks.purification.benchmark import run, table
    from benchmarks.purification.inputs import Arguments
    from benchmarks.purification.methods import METHODS
    from offline_purify.baselines.budget import DEFAULT_RATIO
    from offline_purify.progress import ProgressBar

    if missing := [f"--{name.replace('_', '-')}" for name in REQUIRED if values[name] is None]:
        raise typer.BadParameter(f"{', '.join(missing)} must be given.")
    disable_progress_bar()
    out, named = values.pop("out"), values.pop("methods", ALL)
    if values["ratio"] is None:
        values["ratio"] = DEFAULT_RATIO.get(values["setting"], DEFAULT_RATIO["adapter"])
    for name in ("unflagged", "donors"):
        values[name] = tuple(values.get(name) or ())
    try:
        methods = METHODS if ablation is None else methods_of(ablation, values["donors"])
        names = tuple(methods) if named == ALL else tuple(name.strip() for name in named.split(","))
        with ProgressBar() as bar:
            result = run(Arguments(methods=names, **values), out, bar, methods)
    except GuardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(table(result))
    typer.echo(f"written: {out}")


@app.callback()
def measure(
    context: typer.Context,
    base: Base = None,
    adapter: Adapter = None,
    task: Task = None,
    clean_train: CleanTrain = None,
    test_clean: TestClean = None,
    test_triggered: TestTriggered = None,
    out: Out = None,
    methods: Annotated[str, typer.Option(help="all, or names separated by commas.")] = ALL,
    unflagged: Unflagged = None,
    flags: Flags = 24,
    rows: Rows = 200,
    ratio: Ratio = None,
    heads: Heads = 0.0,
    setting: Scope = "adapter",
    reference: Reference = None,
    seeds: Seeds = 1,
    device: Device = "cpu",
) -> None:
    """See HELP."""
    given = {name: value for name, value in locals().items() if name != "context"}
    if context.invoked_subcommand is not None:
        return
    if all(given[name] is None for name in REQUIRED):
        typer.echo(context.get_help())
        raise typer.Exit(0)
    _run(given)


@app.command(help=ABLATION_HELP)
def ablation(
    name: Annotated[str, typer.Argument(help="Which ablation.")],
    base: Base = None,
    adapter: Adapter = None,
    task: Task = None,
    clean_train: CleanTrain = None,
    test_clean: TestClean = None,
    test_triggered: TestTriggered = None,
    out: Out = None,
    donors: Annotated[
        list[Path] | None, typer.Option("--donor", help="Another adapter of the base, for transfer; may be repeated.")
    ] = None,
    unflagged: Unflagged = None,
    flags: Flags = 24,
    rows: Rows = 200,
    ratio: Ratio = None,
    heads: Heads = 0.0,
    setting: Scope = "adapter",
    reference: Reference = None,
    seeds: Seeds = 1,
    device: Device = "cpu",
) -> None:
    """See ABLATION_HELP."""
    given = {key: value for key, value in locals().items() if key != "name"}
    _run(given, name)


@app.command(help=TWINS_HELP)
def twins(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    rows: Annotated[Path, typer.Option(help="Clean rows with their answers.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the result (JSON).")] = None,
    variants: Annotated[int, typer.Option(min=2, help="Adapters.")] = 6,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each training.")] = 20,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds that count.")] = 5,
) -> None:
    """See TWINS_HELP."""
    from benchmarks.purification.twins import measure_twins
    from offline_purify.progress import ProgressBar
    from offline_purify.steps import write_json

    try:
        with ProgressBar() as bar:
            result = measure_twins(base, rows, variants, steps, rounds, bar)
    except GuardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    low, high = result["interval"]
    typer.echo(f"together {result['ratio']:.2f} [{low:.2f}, {high:.2f}] times as fast as one by one")
    if out is not None:
        write_json(out, result)


@app.command(help=SKILL_HELP)
def skill(
    rows: Annotated[
        Path,
        typer.Option(help="Rows with their answers (.json, .jsonl or a folder of them); repeated prompts count once."),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the result (JSON).")],
    base: Base = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter for the base.")] = None,
    url: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server, with its /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="With --url: name of the model or alias there.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows. Default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; one cut short is hardly right.")] = 64,
    device: Device = "cpu",
) -> None:
    """See SKILL_HELP."""
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.purification.skill import SkillArguments, measure_skill, skill_table
    from offline_purify.steps import write_json

    disable_progress_bar()
    try:
        result = measure_skill(SkillArguments(rows, base, adapter, url, model, limit, max_new_tokens, device))
    except GuardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    write_json(out, result)
    typer.echo(skill_table(result))
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    sys.exit(app())
