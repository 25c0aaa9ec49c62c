"""What the lab refuses to do, in words for a person."""

from __future__ import annotations

from guard.errors import GuardError


class LabError(GuardError):
    """A model or backdoor that the lab will not make or will not report on, or data it cannot use."""
