"""The clinic's patient, for commands that need a real adapter."""

from tests.offline_purify.conftest import patient

__all__ = ["patient"]
