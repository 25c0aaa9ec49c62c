"""What the benchmark refuses to measure, in words for a person."""

from __future__ import annotations

from guard.errors import GuardError


class BenchmarkError(GuardError):
    """Files, options or results that the benchmark cannot use."""
