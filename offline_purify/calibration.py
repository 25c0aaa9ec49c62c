"""The repaired adapter's own profile: what is normal for it, measured as serving will measure it.

A new revision without a profile would be unscored on its first request, so the clinic fits one on clean rows that no
stage was trained on and no figure of the gate was measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guard.probes.transformers.calibrate import calibrate
from guard.probes.transformers.runner import Runner
from guard.rows import Row
from guard.vaccine import Vaccine


def calibrate_candidate(
    base: Path,
    candidate: Path,
    rows: Sequence[Row],
    path: Path,
    *,
    alpha: float,
    seed: int,
    vaccine: Path | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the candidate on clean rows through the guard's probe, fit and save its profile.

    ``vaccine`` is the file of the base's vaccine. Returns {"digest", "n", "smallest_alpha"}. Raises CalibrationError
    with too few rows, AlphaTooFine when they cannot support ``alpha``.
    """
    runner = Runner.load(base, device=device, max_slots=32)
    tick = (lambda done, total: progress("calibrating", done, total)) if progress is not None else None
    learnt = Vaccine.load(vaccine) if vaccine is not None else None
    profile = calibrate(base, candidate, rows, vaccine=learnt, seed=seed, runner=runner, progress=tick)
    profile.check_alpha(alpha)
    return {"digest": profile.save(path), "n": len(rows), "smallest_alpha": profile.smallest_alpha()}
