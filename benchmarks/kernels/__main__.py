"""`python -m benchmarks.kernels`: what the probe kernel costs next to decode attention and a whole decode step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks.kernels.report import CPU_CASES, GPU_CASES, Case, report
from benchmarks.kernels.shape import SHAPES
from guard.errors import GuardError

HELP = """Time the probe kernel against the decode attention it accompanies and against a full decode step, and do the
arithmetic of bytes and operations for an 8B-shaped model (32 requests, 1k to 32k keys) at the bandwidth measured in the
same run. Uses a GPU when there is one, and says so when not. About two minutes on two cores.

Examples:

  python -m benchmarks.kernels --out build/kernels.json

  python -m benchmarks.kernels --shape 0.2b --rows 8 --keys 384 --dtype float32 --threads 1 --out build/kernels.json
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    shape: Annotated[str | None, typer.Option(help=f"{', '.join(SHAPES)}; default: a set of cases.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests in the batch, with --shape.")] = 8,
    keys: Annotated[int, typer.Option(min=1, help="Keys per request, with --shape.")] = 384,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, with --shape.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=2, help="Rounds of each case.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
    mebibytes: Annotated[int, typer.Option(min=1, help="Memory read to measure bandwidth.")] = 512,
) -> None:
    if shape is not None and shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is not one of {', '.join(SHAPES)}", param_hint="--shape")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r} is not float32, bfloat16 or float16", param_hint="--dtype")
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = GPU_CASES if device == "cuda" else CPU_CASES
    if shape is not None:
        cases = (Case(shape, rows, keys, dtype),)
    try:
        with tqdm(total=len(cases) * repeats, desc="kernels") as bar, torch.inference_mode():
            done = report(cases, repeats, device, mebibytes, bar.update)
    except GuardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(done, indent=2) + "\n")
    for sentence in done["in_words"]:
        typer.echo(sentence)


if __name__ == "__main__":
    app()
