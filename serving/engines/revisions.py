"""The books of a running engine: which revisions it serves, with which profile, and how many requests hold each.

A request takes a hold on its revision when it is submitted and gives it back when it is over; a revision is unloaded
only when no request holds it, and none can take hold once unloading has begun. Everything here is bookkeeping under one
lock; loading weights is the engine's work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard.detector import Detector
from guard.errors import ProfileMismatch
from guard.profile import Profile, ProfileKey
from guard.watch import DEFAULT_ALPHA, Watch, Watcher
from serving.errors import Conflict, NotFound


@dataclass
class Served:
    """One revision being served (the base is one too, under None)."""

    key: ProfileKey
    profile: Profile | None = None
    reason: str | None = "no_profile"
    in_flight: int = 0
    leaving: bool = False
    watcher: Watcher | None = field(init=False)

    def __post_init__(self) -> None:
        self.equip(self.profile, self.reason)

    def equip(self, profile: Profile | None, reason: str | None) -> None:
        """Gives it a profile, or the reason why there is none."""
        self.profile, self.reason = profile, None if profile is not None else reason or "no_profile"
        self.watcher = Watcher(profile) if profile is not None else None


class RevisionBooks:
    """Thread-safe table of served revisions. Keys are revision names; None is the base."""

    def __init__(self, base_name: str) -> None:
        self._base_name = base_name
        self._served: dict[str | None, Served] = {}
        self._changed = threading.Condition()

    def add(self, name: str | None, key: ProfileKey, profile: Profile | None, reason: str | None) -> None:
        """Begins to serve a revision."""
        with self._changed:
            self._served[name] = Served(key, profile, reason)

    def __contains__(self, name: object) -> bool:
        with self._changed:
            return name in self._served

    def hold(self, name: str | None, watch: Watch) -> tuple[Detector | None, float, str | None]:
        """Takes hold of a revision for one request: its detector (or None), alpha, and why there is no detector.

        Raises NotFound for a revision that is not served, AlphaTooFine or GuardError for a watch its profile cannot
        keep.
        """
        with self._changed:
            served = self._find(name)
            if served.leaving:
                raise self._unknown(name)
            if served.watcher is None:
                detector, alpha = None, DEFAULT_ALPHA if watch.alpha is None else watch.alpha
            else:
                detector, alpha = served.watcher.detector(watch), served.watcher.alpha(watch)
            served.in_flight += 1
            return detector, alpha, served.reason

    def release(self, name: str | None) -> None:
        """A request that held the revision is over."""
        with self._changed:
            self._served[name].in_flight -= 1
            self._changed.notify_all()

    def read_profile(self, name: str | None, path: str | Path | None) -> Profile | None:
        """The profile in a file, if it belongs to this revision. Raises NotFound or ProfileMismatch."""
        with self._changed:
            key = self._find(name).key
        return None if path is None else Profile.load(path, key)

    def equip(self, name: str | None, profile: Profile | None) -> dict[str, Any]:
        """Gives a revision another profile (None: takes it away). Requests in flight keep their detector."""
        with self._changed:
            served = self._find(name)
            served.equip(profile, None)
            return self._entry(name, served)

    def set_profile(self, name: str | None, path: str | Path | None) -> dict[str, Any]:
        """`read_profile`, then `equip`; a refusal leaves everything as it was."""
        return self.equip(name, self.read_profile(name, path))

    def remove(self, name: str, unload: Callable[[], None], drain_s: float) -> None:
        """Stops serving a revision: waits up to `drain_s` seconds for its requests, then calls `unload`.

        Raises NotFound; Conflict (nothing changed) if requests still hold it.
        """
        with self._changed:
            served = self._find(name)
            if served.leaving:
                raise Conflict(f"revision {name!r} is already being unloaded.", code="revision_leaving")
            served.leaving = True
            if not self._changed.wait_for(lambda: served.in_flight == 0, timeout=drain_s):
                served.leaving = False
                raise Conflict(
                    f"{served.in_flight} request(s) still run {name!r}: wait for them, or ask for a longer drain.",
                    code="revision_in_use",
                )
        try:
            unload()
        except BaseException:
            served.leaving = False
            raise
        with self._changed:
            del self._served[name]

    def entry(self, name: str | None) -> dict[str, Any]:
        """One revision as /guard/status shows it."""
        with self._changed:
            return self._entry(name, self._find(name))

    def entries(self) -> list[dict[str, Any]]:
        """All revisions as /guard/status shows them, the base first."""
        with self._changed:
            return [self._entry(name, served) for name, served in self._served.items()]

    def names(self) -> list[str]:
        """Names that requests may ask for, the base first."""
        with self._changed:
            return [name or self._base_name for name, served in self._served.items() if not served.leaving]

    def _entry(self, name: str | None, served: Served) -> dict[str, Any]:
        return {
            "revision": name or self._base_name,
            "profile": served.profile.digest if served.profile is not None else None,
            "reason": served.reason,
            "in_flight": served.in_flight,
        }

    def _find(self, name: str | None) -> Served:
        if name not in self._served:
            raise self._unknown(name)
        return self._served[name]

    def _unknown(self, name: str | None) -> NotFound:
        return NotFound(f"The model {name!r} does not exist here.", code="model_not_found", param="model")


def load_profile(path: str | Path | None, key: ProfileKey) -> tuple[Profile | None, str | None]:
    """A profile for a start-up that must not fail for want of one: (profile, None), or (None, reason)."""
    if path is None:
        return None, "no_profile"
    try:
        return Profile.load(path, key), None
    except ProfileMismatch:
        return None, "profile_mismatch"
