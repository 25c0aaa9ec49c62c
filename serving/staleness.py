"""Which profiles look stale: one drift monitor per revision, fed by the final clean verdicts of ordinary requests.

A monitor belongs to one profile, window and alpha; a verdict under another one starts a new monitor. It lives in memory
and with its gateway: several gateways judge by their own share of the traffic, and a restart begins anew.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from guard.drift import DriftMonitor
from guard.verdict import Verdict, Window

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drift:
    """What a monitor says: whether the profile is stale, and log10 of the capital that was bet against it."""

    stale: bool = False
    log10_capital: float = 0.0


@dataclass(frozen=True)
class _Watched:
    profile: str | None
    window: Window
    alpha: float
    monitor: DriftMonitor

    def is_of(self, verdict: Verdict) -> bool:
        return (self.profile, self.window, self.alpha) == (verdict.profile, verdict.window, verdict.alpha)


class Staleness:
    """The monitors by revision. Thread-safe: the event loop feeds them, a scrape reads them from a thread."""

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()

    def observe(self, revision: str, verdict: Verdict) -> None:
        """Take in a verdict of ``revision``; only a final one with a p-value counts, and a flagged one changes nothing.

        Never raises: a p-value that cannot be is logged.
        """
        if not verdict.final or verdict.p_value is None or verdict.held_out is None or verdict.status == "flagged":
            return
        with self._lock:
            watched = self._watched.get(revision)
            if watched is None or not watched.is_of(verdict):
                monitor = DriftMonitor(verdict.alpha)
                watched = _Watched(verdict.profile, verdict.window, verdict.alpha, monitor)
                self._watched[revision] = watched
            before = watched.monitor.stale
            try:
                watched.monitor.update(verdict.p_value, verdict.held_out)
            except ValueError as error:
                log.warning("a verdict's p-value cannot be", extra={"revision": revision, "error": str(error)})
            turned = watched.monitor.stale and not before
        if turned:
            told = {"revision": revision, "profile": verdict.profile, "requests": watched.monitor.seen}
            log.warning("clean traffic is odder than its profile: calibrate again", extra=told)

    def of(self, revision: str, profile: str) -> Drift:
        """The drift of ``revision`` away from ``profile`` (its digest); none while no request was ranked by it."""
        with self._lock:
            watched = self._watched.get(revision)
            if watched is None or not profile.startswith(watched.profile or "-"):
                return Drift()
            return Drift(watched.monitor.stale, watched.monitor.log10_capital)
