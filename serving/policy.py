"""What to do about a verdict. Pure: a verdict and a policy go in, a decision comes out; nobody is asked, nothing waits.

The status of the check (clean, flagged, unscored) and the decision of the policy (deliver, block, reroute) are kept
apart: ``observe`` decides to deliver a flagged answer and still says what it would have done. A policy belongs to a
public model name and is set by an operator; no field or header of a client reaches this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from guard.verdict import Verdict, Window

Action = Literal["deliver", "block", "reroute"]


class Policy(BaseModel):
    """How one public model name is guarded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["observe", "block", "reroute"] = Field(
        default="block",
        description="observe: annotate and count only; block: stop; reroute: answer again from elsewhere.",
    )
    window: Window = Field(
        default="all",
        description="Tokens the check may read: prefill (before the first token), a number, or all checkpoints.",
    )
    hold_back: int | None = Field(
        default=None, ge=0, description="Answer tokens withheld until the verdict covering them. Default: the window."
    )
    alpha: float = Field(
        default=0.01, gt=0, lt=1, description="False-alarm rate per request that the operator accepts."
    )
    fail: Literal["open", "closed"] = Field(
        default="open",
        description="What happens to a request that could not be scored: open delivers it, closed blocks it.",
    )
    reroute_to: Literal["previous", "base"] = Field(
        default="previous", description="Who answers a rerouted request: the last good revision, or the base model."
    )

    @field_validator("window")
    @classmethod
    def _window_is_positive(cls, window: Window) -> Window:
        if isinstance(window, int) and (isinstance(window, bool) or window < 1):
            raise ValueError("window counts tokens: use 'prefill' for none, a number >= 1, or 'all'")
        return window

    @model_validator(mode="after")
    def _hold_back_within_window(self) -> Policy:
        limit: int | None = self.window if isinstance(self.window, int) else {"prefill": 0}.get(self.window)
        if self.hold_back is not None and limit is not None and self.hold_back > limit:
            raise ValueError(
                f"hold_back={self.hold_back} is longer than window={self.window!r}: no verdict would ever cover it"
            )
        return self

    @property
    def enforces(self) -> bool:
        """Whether this policy ever stops an answer."""
        return self.mode != "observe"

    @property
    def held_tokens(self) -> int | None:
        """Answer tokens withheld before release; None means until the final verdict. ``observe`` withholds none."""
        if not self.enforces:
            return 0
        if self.hold_back is not None:
            return self.hold_back
        if self.window == "all":
            return None
        return 0 if self.window == "prefill" else int(self.window)

    def engine_fields(self) -> dict[str, Any]:
        """The internal ``headguard`` field of a request to the engine."""
        return {
            "window": self.window,
            "alpha": self.alpha,
            "stop": self.enforces,
            "fail": self.fail if self.enforces else "open",
        }

    def as_block(self) -> Policy:
        """The same policy, blocking: how the answer to a rerouted request is guarded (so rerouting cannot loop)."""
        return self.model_copy(update={"mode": "block"})


@dataclass(frozen=True)
class Decision:
    """What happens to the answer. ``would_action`` is what an enforcing policy would have done, in ``observe``."""

    action: Action
    would_action: Action | None = None

    @property
    def delivers(self) -> bool:
        return self.action == "deliver"


def decide(verdict: Verdict, policy: Policy, released: bool = False) -> Decision:
    """Decide about an answer, of which the client has already seen some tokens if ``released``.

    A clean verdict delivers. A flagged one blocks or reroutes; once tokens are out, rerouting would splice two
    answers, so it becomes a block. An unscored one is delivered or blocked as ``policy.fail`` says.
    """
    if verdict.status == "clean":
        return Decision("deliver")
    wanted: Action
    if verdict.status == "unscored":
        wanted = "block" if policy.fail == "closed" else "deliver"
    else:
        wanted = "reroute" if policy.mode == "reroute" and not released else "block"
    if wanted == "deliver" or policy.enforces:
        return Decision(wanted)
    return Decision("deliver", would_action=wanted)
