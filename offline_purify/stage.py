"""What a repair stage is: a function (suspect, material) -> result that changes the suspect's weights or leaves them.

A stage gets everything it may look at in one frozen object (flags and clean rows to *train* on; held-out flags and
evaluation rows are not in it), changes the suspect's weights in place when it succeeds, and puts them back when it does
not. New methods join by adding a function to the registry in ``purify``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from guard.rows import Row
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.candidates import Candidate
from offline_purify.flags import Flag

if TYPE_CHECKING:
    from offline_purify.signature.score import Signature
    from offline_purify.suspect import Suspect

References = Literal["trusted", "own", "none"]
"""Who answered flags for reference: a model that is trusted, the suspect itself without the trigger, or nobody."""
FULL_LR = 1e-4
"""Adam's rate for a whole model's weights, where LoRA's is 2e-4. The paper's 1e-5 is for 7B models; on the lab's tiny
ones fine-tuning at 1e-4 costs no accuracy, at 3e-4 two points, at 1e-3 thirteen (`refusal-word-fixed`, 200 clean rows,
five epochs)."""

NO_REFERENCE = (
    "no reference at all: no trusted model was given, and taking trigger candidates or focus words out of the flagged "
    "prompts gave no other answers"
)


@dataclass(frozen=True)
class Material:
    """What a stage may learn from: flags (answered and sorted), trigger candidates, clean rows of the training split,
    whose answers the flags' references are, and the signature of the suspect as it came, where it was found already."""

    flags: tuple[Flag, ...]
    behaviour: FlaggedBehaviour
    clean: tuple[Row, ...]
    candidates: tuple[Candidate, ...]
    seed: int
    max_new_tokens: int
    progress: Callable[[str, int, int], None] | None = None
    references: References = "trusted"
    signature: Signature | None = None

    @property
    def true_flags(self) -> list[Flag]:
        """Flags whose answer is the flagged behaviour."""
        return [f for f in self.flags if f.kind == "true"]


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: ``ok`` with the suspect changed, or not ok with the reason and the suspect as it was.

    ``details`` is JSON-able and holds no prompt or answer text: it goes into the report.
    """

    name: str
    ok: bool
    reason: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


Stage = Callable[["Suspect", Material], StageResult]
