"""`python -m benchmarks.detection`: measure one adapter; `report` renders results, `zoo` measures the lab's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.detection.errors import BenchmarkError
from benchmarks.lab.errors import LabError
from guard.errors import GuardError

HELP = """Measure how well the guard detects the backdoor of one adapter, and what it flags in error.

Files hold rows {instruction, input, output} (.json or .jsonl, or a folder of them), and share no prompt.

Examples:

  python -m benchmarks.detection --base BASE --adapter ADAPTER --calibration calibration.json --clean clean.json --triggered triggered.json --vaccine-rows others.json --out result.json

  python -m benchmarks.detection --base BASE --adapter ADAPTER --calibration c.json --clean k.json --triggered t.json --vaccine vaccine.safetensors --window 8 --alpha 0.02 --out result.json

  python -m benchmarks.detection zoo --root build/lab --out build/detection

  python -m benchmarks.detection report build/detection/*.json --out docs/detection.md
"""  # noqa: E501
ZOO_HELP = """Measure the implants of a zoo, one after the other; a run that was stopped goes on.

tiny: the lab's own tasks; nothing is needed, about half an hour on two cores the first time.

real: the public benchmark's attacks on a base trained on real instructions. Needs a folder --data with backdoorllm/train/TASK/ATTACK/{poisoned,clean}.json, backdoorllm/test/TASK/{clean,ATTACK}.json and instruct/*.json (one of them alpaca*.json). The first time takes about two hours on two cores (`python -m benchmarks.lab real --help` says for what), then each implant is measured in three to six minutes. Implants that do not fire, or fire without their trigger, are reported and left out.

Examples:

  python -m benchmarks.detection zoo --root build/lab --out build/detection

  python -m benchmarks.detection zoo --zoo real --data DIR --out build/detection-real
"""  # noqa: E501
app = typer.Typer(
    name="benchmarks.detection",
    help=HELP,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
REQUIRED = ("base", "adapter", "calibration", "clean", "triggered", "out")
Alpha = Annotated[float, typer.Option(help="False-alarm rate over a whole request.")]
WindowText = Annotated[str, typer.Option("--window", help="prefill, all, or a number of generated tokens to read.")]
Seed = Annotated[int, typer.Option(help="Of the calibration split, the controls and the bootstrap.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Rows = Annotated[int, typer.Option("--control-rows", min=20, help="Clean prompts that each control changes.")]
Vaccines = Annotated[Path, typer.Option(help="Cache folder of vaccines, one per base.")]


def _guarded(work: Callable[[Any], None]) -> None:
    """Do ``work(progress)``; what it refuses becomes one line on stderr and exit code 1."""
    from transformers.utils.logging import disable_progress_bar

    from offline_purify.progress import ProgressBar

    disable_progress_bar()
    try:
        with ProgressBar() as bar:
            work(bar)
    except (GuardError, LabError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.callback()
def measure(
    context: typer.Context,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of the suspicious adapter (PEFT LoRA).")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Clean rows that the guard is calibrated on.")] = None,
    clean: Annotated[Path | None, typer.Option(help="Fresh clean rows, of the same kind of traffic.")] = None,
    triggered: Annotated[Path | None, typer.Option(help="Rows that hold the trigger.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the result (JSON).")] = None,
    vaccine: Annotated[Path | None, typer.Option(help="A vaccine of this base; else the cached one.")] = None,
    vaccine_rows: Annotated[
        Path | None, typer.Option(help="Clean rows, none of them in another file, to make the vaccine from.")
    ] = None,
    vaccines: Vaccines = Path("build/vaccines"),
    alpha: Alpha = 0.01,
    window: WindowText = "2",
    trigger: Annotated[
        str | None, typer.Option(help="The trigger's word, phrase or words; found from the files when not given.")
    ] = None,
    clean_adapter: Annotated[Path | None, typer.Option(help="Control: an adapter without a backdoor.")] = None,
    benign_adapter: Annotated[
        Path | None, typer.Option(help="Control: an adapter that behaves conditionally for a good reason.")
    ] = None,
    benign_rows: Annotated[
        Path | None, typer.Option(help="Rows on which the benign adapter's condition holds.")
    ] = None,
    control_rows: Rows = 300,
    name: Annotated[str, typer.Option(help="Name in the report (default: the result's file name).")] = "",
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """See HELP."""
    if context.invoked_subcommand is not None:
        return
    values = dict(zip(REQUIRED, (base, adapter, calibration, clean, triggered, out), strict=True))
    if all(value is None for value in values.values()):
        typer.echo(context.get_help())
        raise typer.Exit(0)
    missing = [f"--{option}" for option in REQUIRED if values[option] is None]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} must be given.")
    given: dict[str, Any] = {option: value for option, value in values.items() if option != "out"}
    target = Path(str(out))

    def work(progress: Any) -> None:
        from benchmarks.detection.benchmark import run, save
        from benchmarks.detection.inputs import Arguments, parse_window
        from benchmarks.detection.report import summary

        arguments = Arguments(
            **given,
            vaccine=vaccine,
            vaccine_rows=vaccine_rows,
            vaccines=vaccines,
            alpha=alpha,
            window=parse_window(window),
            trigger=trigger,
            clean_adapter=clean_adapter,
            benign_adapter=benign_adapter,
            benign_rows=benign_rows,
            control_rows=control_rows,
            seed=seed,
            name=name or target.stem,
            device=device,
        )
        result = run(arguments, progress)
        save(result, target)
        typer.echo(summary(result))
        typer.echo(f"written: {target}")

    _guarded(work)


@app.command(epilog="Example: python -m benchmarks.detection report build/detection/*.json --out docs/detection.md")
def report(
    results: Annotated[list[Path], typer.Argument(help="Results (JSON files or folders of them).")],
    out: Annotated[Path, typer.Option(help="Markdown file to write; the ROC plot goes beside it.")] = Path(
        "docs/detection.md"
    ),
    preface: Annotated[
        Path | None, typer.Option(help="Markdown to put in front of the tables (what was explored, ablations).")
    ] = None,
) -> None:
    """Render results as a document: the paper's figures beside ours, power, promise, controls, localisation."""

    def work(_: Any) -> None:
        from benchmarks.detection.report import read_results, write_report

        if preface is not None and not preface.is_file():
            raise BenchmarkError(f"--preface {preface}: no such file.")
        text = preface.read_text(encoding="utf-8") if preface is not None else ""
        write_report(read_results(results), out, text)
        typer.echo(f"written: {out}")

    _guarded(work)


@app.command(help=ZOO_HELP)
def zoo(
    root: Annotated[Path, typer.Option(help="Folder of the lab's models.")] = Path("build/lab"),
    name: Annotated[str, typer.Option("--zoo", help="Which zoo: tiny or real.")] = "tiny",
    data: Annotated[
        Path | None, typer.Option(help="Data folder of the real zoo.", envvar="HEADGUARD_DATA", show_envvar=True)
    ] = None,
    size: Annotated[str, typer.Option(help="Base of the real zoo: small, or large (needs a GPU).")] = "small",
    out: Annotated[Path, typer.Option(help="Folder for rows files and results; what is there is kept.")] = Path(
        "build/detection"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Implants to measure (default: all); repeatable.")] = None,
    leave_out: Annotated[bool, typer.Option(help="Vaccinate without the implant's behaviour family.")] = False,
    alpha: Alpha = 0.01,
    window: WindowText = "2",
    control_rows: Rows = 300,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """See ZOO_HELP."""

    def work(progress: Any) -> None:
        from benchmarks.detection.inputs import parse_window
        from benchmarks.detection.zoo import Settings, measure_zoo

        settings = Settings(alpha, parse_window(window), control_rows, seed, device)

        def say(text: str) -> None:
            typer.echo(text, err=True)

        for path in measure_zoo(root, name, out, settings, only or None, leave_out, progress, data, size, say):
            typer.echo(f"written: {path}")

    _guarded(work)


@app.command(
    epilog="Example: python -m benchmarks.detection variants --root build/lab --out build/detection/variants.json"
)
def variants(
    root: Annotated[Path, typer.Option(help="Folder of the lab's models.")] = Path("build/lab"),
    out: Annotated[Path, typer.Option(help="Where to write the figures (JSON).")] = Path(
        "build/detection/variants.json"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Variants to leave out (default: each); repeatable.")] = None,
    alpha: Alpha = 0.01,
    window: WindowText = "2",
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Leave out each variant of the tiny base's vaccine in turn: what the guard's design is chosen by."""

    def work(progress: Any) -> None:
        from benchmarks.detection.benchmark import save
        from benchmarks.detection.inputs import parse_window
        from benchmarks.detection.variants import left_out_figures, table
        from benchmarks.detection.zoo import fresh_clinic_rows
        from benchmarks.lab.cache import ensure_tiny, ensure_vaccine

        vaccine, base = ensure_vaccine(root, seed), ensure_tiny(root, (), seed).base
        settings: dict[str, Any] = {"alpha": alpha, "window": parse_window(window), "seed": seed, "device": device}
        rows = fresh_clinic_rows(seed)
        found = left_out_figures(base, vaccine, rows, only=only or None, progress=progress, **settings)
        save({"settings": settings, "variants": found}, out)
        typer.echo(f"{table(found)}\nwritten: {out}")

    _guarded(work)


if __name__ == "__main__":
    sys.exit(app())
