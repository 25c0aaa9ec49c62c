"""`headguard calibrate`: measure clean prompts, fit what is normal, save it as a profile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from serving.cli.output import AsJson, Failure, progress, show

if TYPE_CHECKING:
    from guard.profile import Profile
    from guard.readings import Measurement
    from guard.rows import Row
    from guard.vaccine import Vaccine


class EngineName(StrEnum):
    """Engines that a profile can be fitted for."""

    transformers = "transformers"
    vllm = "vllm"


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
    engine: Annotated[
        EngineName, typer.Option(help="Engine that will serve: a profile is good for the one it was measured on.")
    ] = EngineName.transformers,
    dtype: Annotated[str, typer.Option(help="Dtype as vLLM will serve (float32, bfloat16, float16).")] = "float32",
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
    keep_repeated: Annotated[
        bool, typer.Option(help="Calibrate on prompts whose answers repeat word for word, too: you know them innocent.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a report: plots, and which alpha is supported.")
    ] = None,
    triggered: Annotated[
        Path | None, typer.Option(help="Rows with a known trigger: the report then shows a ROC. Never fitted on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit what is normal for one adapter on clean prompts, and say which false-alarm rate that supports."""
    from guard.rows import assert_disjoint, read_rows
    from guard.support import statement, supports
    from guard.vaccine import Vaccine

    rows = read_rows(prompts)[:limit]
    with_trigger = read_rows(triggered) if triggered is not None else []
    if with_trigger and report is None:
        raise Failure("--triggered only adds to a report: say where with --report DIR.")
    if engine is EngineName.transformers and dtype != "float32":
        raise Failure("the transformers engine serves in float32: leave --dtype out, or give --engine vllm.")
    assert_disjoint(prompts=rows, triggered=with_trigger)
    learnt = Vaccine.load(vaccine) if vaccine is not None else None
    with _started(engine, model, adapter, dtype, max_new_tokens) as started:
        with progress("measuring clean prompts", as_json) as update:
            profile = started.fit(rows, learnt, keep_repeated, seed, update)
        page = _report(profile, started, with_trigger, report, alpha, as_json) if report else None
    profile.check_alpha(alpha)
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = profile.save(out)
    support = supports(profile, alpha)
    told = {
        "profile": str(out),
        "digest": digest,
        "key": {"base": profile.key.base, "adapter": profile.key.adapter, "engine": profile.key.engine},
        "smallest_alpha": profile.smallest_alpha(),
        "checkpoints": list(profile.steps),
        "length_buckets": [
            {
                "low": s.low,
                "high": s.high,
                "held_out": s.held_out,
                "smallest_alpha": s.smallest_alpha,
                "realised_99": s.realised,
            }
            for s in support
        ],
        "report": str(page) if page else None,
        **profile.facts,
    }
    lines = [
        f"{out}  sha256 {digest[:12]}",
        profile.facts["hygiene"],
        f"{profile.facts['n_fit']} clean requests fitted, {profile.facts['n_held_out']} held out.",
        statement(support, alpha),
        *[f"  {s.low} to {s.high} tokens: {s.held_out} held out" for s in support],
        *([f"report: {page}"] if page else []),
    ]
    show(told, as_json, "\n".join(lines))


class _Started(Protocol):
    """An engine that measures one adapter."""

    tokenizer: Any

    def fit(
        self, rows: Sequence[Row], vaccine: Vaccine | None, keep_repeated: bool, seed: int, update: Any
    ) -> Profile: ...

    def measure(self, prompts: Sequence[Sequence[int]], update: Any) -> Measurement: ...


@contextmanager
def _started(
    engine: EngineName, model: Path, adapter: Path | None, dtype: str, max_new_tokens: int | None
) -> Iterator[_Started]:
    if engine is EngineName.vllm:
        vllm = _Vllm(model, adapter, dtype, max_new_tokens)
        try:
            yield vllm
        finally:
            vllm.close()
    else:
        yield _Transformers(model, adapter, max_new_tokens)


class _Transformers:
    def __init__(self, model: Path, adapter: Path | None, max_new_tokens: int | None) -> None:
        from guard.probes.transformers.runner import Runner

        self._model, self._adapter, self._max_new_tokens = model, adapter, max_new_tokens
        self._runner = Runner.load(model)
        self.tokenizer = self._runner.tokenizer

    def fit(self, rows: Sequence[Row], vaccine: Vaccine | None, keep_repeated: bool, seed: int, update: Any) -> Profile:
        from guard.probes.transformers.calibrate import calibrate

        return calibrate(
            self._model, self._adapter, rows, vaccine=vaccine, keep_repeated=keep_repeated, seed=seed,
            max_new_tokens=self._max_new_tokens, runner=self._runner, progress=update,
        )  # fmt: skip

    def measure(self, prompts: Sequence[Sequence[int]], update: Any) -> Measurement:
        from guard.probes.transformers.calibrate import measure_adapter

        return measure_adapter(
            self._runner, self._adapter, prompts, max_new_tokens=self._max_new_tokens, progress=update
        )


class _Vllm:
    def __init__(self, model: Path, adapter: Path | None, dtype: str, max_new_tokens: int | None) -> None:
        from guard.probes.vllm.calibrate import Calibrator

        self._max_new_tokens = max_new_tokens
        self._calibrator = Calibrator(model, adapter, dtype)
        self.tokenizer, self.close = self._calibrator.tokenizer, self._calibrator.close

    def fit(self, rows: Sequence[Row], vaccine: Vaccine | None, keep_repeated: bool, seed: int, update: Any) -> Profile:
        return self._calibrator.calibrate(
            rows, vaccine=vaccine, keep_repeated=keep_repeated, seed=seed, max_new_tokens=self._max_new_tokens,
            progress=update,
        )  # fmt: skip

    def measure(self, prompts: Sequence[Sequence[int]], update: Any) -> Measurement:
        return self._calibrator.measure(prompts, self._max_new_tokens, update)


def _report(
    profile: Profile, started: _Started, triggered: Sequence[Row], folder: Path, alpha: float, as_json: bool
) -> Path:
    """Write the report, with a ROC where there are rows with a known trigger."""
    import numpy as np

    from guard.calibration_report import write_report
    from guard.template import render, row_messages

    if not triggered:
        return write_report(profile, folder, alpha=alpha)
    prompts = [render(started.tokenizer, row_messages(row)) for row in triggered]
    with progress("measuring triggered prompts", as_json) as update:
        measured = started.measure(prompts, update)
    return write_report(profile, folder, alpha=alpha, measurement=measured, labels=np.ones(len(prompts), dtype=bool))
