"""Does the guard see it? Prompts through the suspicious revision's own profile, as serving scored its requests.

A trigger candidate that fires the behaviour should fire the score as well; where it does not, the guard is blind to
this trigger, and whoever decides on the repair should know. And which words does it see? A flagged request is scored
again without each of them (`guard.removal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from guard.adapters import inspect_adapter
from guard.detector import Detector
from guard.identity import base_digest
from guard.probes.transformers.calibrate import served_key
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.profile import Profile
from guard.removal import removal_spans
from offline_purify.flags import Flag


class Rescoring:
    """The guard of one revision, as it looks at a request before its first token.

    ``adapter`` None: the base alone. Raises ProfileMismatch when the profile belongs to something else, AlphaTooFine
    when it cannot support ``alpha``.
    """

    def __init__(self, base: Path, adapter: Path | None, profile: Path, alpha: float, device: str = "cpu") -> None:
        digest = inspect_adapter(adapter, base).digest if adapter is not None else None
        self._runner = Runner.load(base, device=device, max_slots=32)
        fitted = Profile.load(profile, served_key(self._runner, base_digest(base), digest))
        self._detector = Detector(fitted, "prefill", alpha)
        self._revision = "suspect" if adapter is not None else None
        if adapter is not None:
            self._runner.add_adapter("suspect", adapter, inspected=True)

    def p_values(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """p-values [n] of prompts of token ids; NaN for those that cannot be scored."""
        return self._detector.p_values(measure(self._runner, prompts, (0,), 1, self._revision))

    def flags(self, prompts: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each prompt is flagged; one that cannot be scored is not."""
        return [bool(p <= self._detector.alpha) for p in self.p_values(prompts)]

    def located(self, flag: Flag) -> Flag:
        """The flag with its spans where its words matter to the guard; as it came where none does, or where words
        cannot be told apart in this base's prompts."""
        try:
            spans = removal_spans(self._runner.tokenizer, flag.messages, self.p_values)
        except ValueError:
            return flag
        return replace(flag, spans=spans) if spans else flag
