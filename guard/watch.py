"""How one request is to be guarded: what the gateway asks of an engine, request by request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guard.detector import Detector
from guard.errors import GuardError
from guard.profile import Profile
from guard.verdict import Window

WATCH_VARIABLE = "HEADGUARD_WATCH"
"""Environment variable with the watch (JSON, as `Watch.parse` takes it) of requests that carry none."""
DEFAULT_ALPHA = 0.05
"""Asked for no alpha, an engine tests at this false-alarm rate, or at the finest that the calibration supports."""


@dataclass(frozen=True)
class Watch:
    """stop: end the request at the step that flags it; fail_closed: also when it is unscored; no alpha: the default."""

    window: Window = "all"
    alpha: float | None = None
    stop: bool = False
    fail_closed: bool = False

    @classmethod
    def parse(cls, told: str | Mapping[str, Any]) -> Watch:
        """From `{"window", "alpha", "stop", "fail": "open" | "closed"}`, as JSON or as it is; what is missing has its
        default. Raises GuardError for anything else."""
        try:
            data = dict(json.loads(told) if isinstance(told, str) else told)
            window, alpha = data.get("window", "all"), data.get("alpha")
            good = window in ("prefill", "all") or (type(window) is int and window >= 0)
            good = good and (alpha is None or (isinstance(alpha, float | int) and 0 < alpha < 1))
            stop, fail = data.get("stop", False), data.get("fail", "open")
            if not good or not isinstance(stop, bool) or fail not in ("open", "closed"):
                raise ValueError
            return cls(window, alpha, stop, fail == "closed")
        except (TypeError, ValueError) as error:
            raise GuardError(
                "a request's watch is not understood: expected window 'prefill', 'all' or a number of tokens, alpha "
                "between 0 and 1 or none, stop true or false, fail 'open' or 'closed'."
            ) from error


def default_watch() -> Watch:
    """The watch of requests that carry none, from the environment. Raises GuardError if it is not understood."""
    return Watch.parse(os.environ.get(WATCH_VARIABLE, "{}"))


class Watcher:
    """The detectors of one profile, made as they are asked for and kept per (window, alpha)."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._detectors: dict[tuple[Window, float], Detector] = {}

    def alpha(self, watch: Watch) -> float:
        """The alpha that a watch is kept at."""
        if watch.alpha is not None:
            return watch.alpha
        return max(DEFAULT_ALPHA, self.profile.smallest_alpha(watch.window))

    def detector(self, watch: Watch) -> Detector:
        """The detector for a watch. Raises AlphaTooFine or GuardError for one that the profile cannot keep."""
        key = watch.window, self.alpha(watch)
        if key not in self._detectors:
            self._detectors[key] = Detector(self.profile, *key)
        return self._detectors[key]
