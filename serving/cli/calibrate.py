"""`headguard calibrate`: measure clean prompts, fit what is normal, save it as a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.output import AsJson, progress, show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "calibrate",
        epilog="Example: headguard calibrate --model BASE --adapter my-lora --prompts clean.json --out p.safetensors",
    )(calibrate)


def calibrate(
    model: Annotated[Path, typer.Option(help="Folder of the base model.")],
    prompts: Annotated[Path, typer.Option(help="File or folder of clean {instruction, input, output} rows.")],
    out: Annotated[Path, typer.Option(help="Where to write the profile (.safetensors).")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of the adapter; without it, the bare base.")] = None,
    vaccine: Annotated[
        Path | None, typer.Option(help="Vaccine of the base (headguard vaccinate): adds the vaccinated signal.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="False-alarm rate that the profile must support.", min=1e-9, max=0.5)
    ] = 0.01,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated per prompt (default: 33).", min=1)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many prompts.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split into fitted and held-out prompts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit what is normal for one adapter on clean prompts, and say which false-alarm rate that supports."""
    from guard.probes.transformers.calibrate import calibrate as fit
    from guard.rows import read_rows
    from guard.vaccine import Vaccine

    rows = read_rows(prompts)[:limit]
    learnt = Vaccine.load(vaccine) if vaccine is not None else None
    with progress("measuring clean prompts", as_json) as update:
        profile = fit(model, adapter, rows, vaccine=learnt, seed=seed, max_new_tokens=max_new_tokens, progress=update)
    profile.check_alpha(alpha)
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = profile.save(out)
    report = {
        "profile": str(out),
        "digest": digest,
        "key": {"base": profile.key.base, "adapter": profile.key.adapter, "engine": profile.key.engine},
        "smallest_alpha": profile.smallest_alpha(),
        "checkpoints": list(profile.steps),
        "length_buckets": [
            {"low": b.low, "high": b.high, "held_out": len(b.maxima), "smallest_alpha": b.smallest_p}
            for b in profile.buckets("all")
        ],
        **profile.facts,
    }
    lines = [f"{out}  sha256 {digest[:12]}"]
    lines.append(
        f"{profile.facts['n_fit']} clean requests fitted, {profile.facts['n_held_out']} held out: "
        f"any alpha >= {profile.smallest_alpha():.4g} is kept over the whole request,"
    )
    lines.insert(1, profile.facts["hygiene"])
    lines.append("for clean traffic exchangeable with these prompts and prompts of")
    lines += [f"  {b.low} to {b.high} tokens ({len(b.maxima)} held out)" for b in profile.buckets("all")]
    show(report, as_json, "\n".join(lines))
