"""Calibration with the embedded engine's own runner: clean prompts in, a profile out.

The prompts are answered greedily by the very revision that will be served, through the probe that will watch it; what
the probe reads is fitted by `guard.fitting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guard.adapters import inspect_adapter
from guard.fitting import profile_of, unique_rows
from guard.identity import adapter_digest, base_digest
from guard.probes.transformers.measure import Progress, measure
from guard.probes.transformers.runner import Runner
from guard.profile import NO_ADAPTER, Profile, ProfileKey
from guard.readings import Measurement, checkpoints_within
from guard.rows import Row
from guard.template import render, row_messages
from guard.vaccine import Vaccine

ENGINE = "transformers"


def served_key(runner: Runner, base: str, adapter: str | None) -> ProfileKey:
    """The key of what ``runner`` serves: base and adapter digests (64 hex; None for the bare base)."""
    dtype = str(runner.dtype).removeprefix("torch.")
    return ProfileKey(base, adapter or NO_ADAPTER, ENGINE, dtype, runner.probe_key())


def calibrate(
    base: str | Path,
    adapter: str | Path | None,
    rows: Sequence[Row],
    *,
    vaccine: Vaccine | None = None,
    keep_repeated: bool = False,
    seed: int = 0,
    max_new_tokens: int | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Fit the profile of one adapter (None: the bare base) on clean rows; only what they ask is used.

    ``vaccine`` (of this base) adds the signal that it carries. ``keep_repeated`` calibrates on prompts with repeated
    answers all the same: the caller knows them to be innocent (an adapter that declines a topic in the same words).
    ``runner`` may be one that is already loaded with ``base``. Raises CalibrationError for too few or repeated prompts,
    ProfileMismatch for a vaccine of another base or probe, AdapterRejected for an adapter that must not be loaded,
    PromptTooLong for a row that does not fit.
    """
    unique = unique_rows(rows)
    runner = runner or Runner.load(base)
    served = base_digest(base)
    if vaccine is not None:
        vaccine.check(served, runner.probe_key())
    digest = inspect_adapter(adapter, base).digest if adapter is not None else None
    prompts = [render(runner.tokenizer, row_messages(row)) for row in unique]
    measurement = measure_adapter(runner, adapter, prompts, max_new_tokens=max_new_tokens, progress=progress)
    return profile_of(
        measurement, prompts, unique, served_key(runner, served, digest), vaccine=vaccine,
        keep_repeated=keep_repeated, seed=seed, n_repeated=len(rows) - len(unique),
    )  # fmt: skip


def measure_adapter(
    runner: Runner,
    adapter: str | Path | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """What the probe reads while an adapter of the runner's base (None: the bare base) answers prompts (token ids).

    The adapter is loaded for it and unloaded again; inspecting it is the caller's duty. Raises PromptTooLong.
    """
    revision = f"measured-{adapter_digest(adapter)[:12]}" if adapter is not None else None
    if adapter is not None and revision is not None:
        runner.add_adapter(revision, adapter)
    try:
        return measure(runner, prompts, checkpoints_within(max_new_tokens), max_new_tokens, revision, progress)
    finally:
        if revision is not None and revision in runner.adapters:
            runner.remove_adapter(revision)
