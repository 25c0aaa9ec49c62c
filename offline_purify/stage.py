"""What a repair stage is: a function (suspect, material) -> result that changes the suspect's adapter or leaves it.

A stage gets everything it may look at in one frozen object (flags and clean rows to *train* on; held-out flags and
evaluation rows are not in it), changes the adapter's weights in place when it succeeds, and puts them back when it does
not. New methods join by adding a function to the registry in ``purify``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from guard.rows import Row
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.candidates import Candidate
from offline_purify.flags import Flag

if TYPE_CHECKING:
    from offline_purify.signature.find import Signature
    from offline_purify.suspect import Suspect


@dataclass(frozen=True)
class Material:
    """What a stage may learn from: flags (answered and sorted), trigger candidates, clean rows of the training split,
    and the signature of the adapter as it came, where it was found already."""

    flags: tuple[Flag, ...]
    behaviour: FlaggedBehaviour
    clean: tuple[Row, ...]
    candidates: tuple[Candidate, ...]
    seed: int
    max_new_tokens: int
    progress: Callable[[str, int, int], None] | None = None
    signature: Signature | None = None

    @property
    def true_flags(self) -> list[Flag]:
        """Flags whose answer is the flagged behaviour."""
        return [f for f in self.flags if f.kind == "true"]


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: ``ok`` with the adapter changed, or not ok with the reason and the adapter as it was.

    ``details`` is JSON-able and holds no prompt or answer text: it goes into the report.
    """

    name: str
    ok: bool
    reason: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


Stage = Callable[["Suspect", Material], StageResult]
