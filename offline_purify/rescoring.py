"""Does the guard see it? Prompts through the suspicious revision's own profile, as serving scored its requests.

A trigger candidate that fires the behaviour should fire the score as well; where it does not, the guard is blind to
this trigger, and whoever decides on the repair should know.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guard.adapters import inspect_adapter
from guard.detector import Detector
from guard.identity import base_digest
from guard.probes.transformers.calibrate import served_key
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.profile import Profile
from offline_purify.candidates import Watch


def open_watch(base: Path, adapter: Path | None, profile: Path, alpha: float, device: str = "cpu") -> Watch:
    """Whether the guard flags prompts to the adapter (None: to the base alone) before their first token; one that
    cannot be scored counts as not flagged.

    Raises ProfileMismatch when the profile belongs to something else, AlphaTooFine when it cannot support ``alpha``.
    """
    digest = inspect_adapter(adapter, base).digest if adapter is not None else None
    runner = Runner.load(base, device=device, max_slots=32)
    detector = Detector(Profile.load(profile, served_key(runner, base_digest(base), digest)), "prefill", alpha)
    revision = "suspect" if adapter is not None else None
    if adapter is not None:
        runner.add_adapter("suspect", adapter, inspected=True)

    def flagged(prompts: Sequence[Sequence[int]]) -> list[bool]:
        told = measure(runner, prompts, (0,), 1, revision)
        return [bool(p <= alpha) for p in detector.p_values(told)]

    return flagged
