"""The candidate's own profile: what is normal for it, measured as serving will measure it.

A new revision without a profile would be unscored on its first request, so the clinic fits one on clean rows that no
stage was trained on and no figure of the gate was measured on. It is measured on the engine and in the dtype that the
suspicious revision's own profile is for: there the candidate will be served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guard.errors import ProfileMismatch
from guard.probes.transformers.calibrate import ENGINE, calibrate
from guard.probes.transformers.runner import Runner
from guard.profile import Profile, ProfileKey
from guard.rows import Row
from guard.vaccine import Vaccine

Tick = Callable[[int, int], None]


def calibrate_candidate(
    base: Path,
    candidate: Path | None,
    rows: Sequence[Row],
    path: Path,
    *,
    alpha: float,
    seed: int,
    vaccine: Path | None = None,
    like: Path | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the candidate (an adapter of ``base``; None: ``base`` itself, a repaired model) on clean rows through the
    guard's probe, fit and save its profile.

    ``vaccine`` is the file of the base's vaccine, ``like`` the suspicious revision's profile, which names the engine.
    Returns {"digest", "n", "smallest_alpha"}. Raises CalibrationError with too few rows, AlphaTooFine when they cannot
    support ``alpha``, UnsupportedModel when the engine is not installed here.
    """
    tick = (lambda done, total: progress("calibrating", done, total)) if progress is not None else None
    learnt = Vaccine.load(vaccine) if vaccine is not None else None
    key = _key(like)
    if key is None or key.engine == ENGINE:
        runner = Runner.load(base, device=device, max_slots=32)
        profile = calibrate(base, candidate, rows, vaccine=learnt, seed=seed, runner=runner, progress=tick)
    else:
        profile = _by_vllm(base, candidate, rows, key.dtype, learnt, seed, tick)
    profile.check_alpha(alpha)
    return {"digest": profile.save(path), "n": len(rows), "smallest_alpha": profile.smallest_alpha()}


def _key(profile: Path | None) -> ProfileKey | None:
    """What a profile is for; None without one that can be read, which stops no repair."""
    try:
        return Profile.load(profile).key if profile is not None else None
    except ProfileMismatch:
        return None


def _by_vllm(
    base: Path,
    candidate: Path | None,
    rows: Sequence[Row],
    dtype: str,
    vaccine: Vaccine | None,
    seed: int,
    tick: Tick | None,
) -> Profile:
    from guard.probes.vllm.calibrate import Calibrator

    calibrator = Calibrator(base, candidate, dtype)
    try:
        return calibrator.calibrate(rows, vaccine=vaccine, seed=seed, progress=tick)
    finally:
        calibrator.close()
