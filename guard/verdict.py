"""What the guard says about one request: the status of its check. What to do about it is the policy's affair."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Status = Literal["clean", "flagged", "unscored"]
Window = Literal["prefill", "all"] | int


@dataclass(frozen=True)
class HeadScore:
    """One attention head and how far its similarity to the other heads of its layer is from normal (z units)."""

    layer: int
    head: int
    score: float


@dataclass(frozen=True)
class Span:
    """Prompt tokens [start, end) that draw most focus; ``weight`` is their share of all that is beyond normal."""

    start: int
    end: int
    weight: float
    text: str = ""


@dataclass(frozen=True)
class Verdict:
    """The state of the check after ``step`` generated tokens were read (0: the row of the last prompt position).

    ``p_value`` is conformal: for clean traffic like the calibration's, P(p_value <= alpha at any step) <= alpha.
    ``held_out`` is the number of calibration requests it was ranked among: no p-value is below 1 / (held_out + 1).
    ``reason`` is set if and only if the request is ``unscored``. ``final`` means that no later step can change it.
    """

    status: Status
    alpha: float
    step: int
    window: Window
    final: bool = False
    p_value: float | None = None
    signal: str | None = None
    heads: tuple[HeadScore, ...] = ()
    spans: tuple[Span, ...] = ()
    reason: str | None = None
    profile: str | None = None
    held_out: int | None = None

    def __post_init__(self) -> None:
        if (self.status == "unscored") != (self.reason is not None):
            raise ValueError(f"a verdict has a reason if and only if it is unscored: {self.status}, {self.reason!r}")

    def closed(self) -> Verdict:
        """The same verdict, marked final."""
        return replace(self, final=True)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; ``from_dict`` gives the verdict back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        """The verdict that ``to_dict`` wrote. Raises TypeError or ValueError on anything else."""
        data = dict(data)
        data["heads"] = tuple(HeadScore(**h) for h in data.get("heads", ()))
        data["spans"] = tuple(Span(**s) for s in data.get("spans", ()))
        return cls(**data)


def unscored(reason: str, *, alpha: float, window: Window, step: int = 0, profile: str | None = None) -> Verdict:
    """A final verdict for a request that could not be measured: never ``clean``, always counted."""
    return Verdict("unscored", alpha, step, window, final=True, reason=reason, profile=profile)
