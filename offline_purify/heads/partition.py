"""Suspicious, safe and middle heads from their safety scores: the paper's thresholds, and what to do when they fail.

tau rule: S < tau is suspicious, S > 1 - tau is safe. At the paper's tau = 0.3 one of the sets is often empty (a single
head with a large gradient shrinks all others), so a set below ``smallest`` is filled by rank: the lowest tenth of the
scores, the highest quarter; and a set of more than half of all heads is cut to half. That is a fallback and is
reported as one. *Contrast* ranks by S(flagged) - S(clean) and so finds heads that the flagged inputs make unsafe,
rather than heads that always are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Rule = Literal["tau", "rank", "contrast"]
TAU = 0.3
LOWEST, HIGHEST = 0.10, 0.25


@dataclass(frozen=True)
class Partition:
    """Disjoint head sets, bool [L, H] each; all other heads are in the middle. ``fallback`` if a rank rule filled
    in."""

    suspicious: Tensor
    safe: Tensor
    rule: str
    fallback: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: lists of [layer, head]."""
        return {
            "rule": self.rule,
            "fallback": self.fallback,
            "suspicious": self.suspicious.nonzero().tolist(),
            "safe": self.safe.nonzero().tolist(),
        }


def _lowest(scores: Tensor, share: float, smallest: int) -> Tensor:
    n = min(max(smallest, round(share * scores.numel())), scores.numel() // 2)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(stable=True)[:n]] = True
    return chosen.view_as(scores)


def partition(
    scores: Tensor,
    *,
    rule: Rule = "tau",
    clean_scores: Tensor | None = None,
    tau: float = TAU,
    smallest: int = 2,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> Partition:
    """Part the heads by ``rule``; scores fp32 [L, H], ``clean_scores`` the same on clean inputs (rule contrast).

    Raises ValueError when contrast is asked for without clean scores, or tau is outside (0, 0.5].
    """
    if not 0 < tau <= 0.5:
        raise ValueError(f"tau must lie in (0, 0.5], got {tau}")
    if rule == "contrast":
        if clean_scores is None:
            raise ValueError("the contrast rule needs the scores on clean inputs")
        change = scores - clean_scores
        suspicious = _lowest(change, lowest, smallest)
        return Partition(
            suspicious, _lowest((-scores).masked_fill(suspicious, torch.inf), highest, smallest), rule, False
        )
    if rule == "rank":
        suspicious = _lowest(scores, lowest, smallest)
        return Partition(
            suspicious, _lowest((-scores).masked_fill(suspicious, torch.inf), highest, smallest), rule, False
        )
    half = scores.numel() // 2
    suspicious, safe = scores < tau, scores > 1 - tau
    crowded = int(suspicious.sum()) > half or int(safe.sum()) > half
    if int(suspicious.sum()) > half:
        suspicious = _lowest(scores, 0.5, smallest)
    if int(safe.sum()) > half:
        safe = _lowest(-scores, 0.5, smallest)
    few_suspicious, few_safe = int(suspicious.sum()) < smallest, int(safe.sum()) < smallest
    if few_suspicious:
        suspicious = _lowest(scores.masked_fill(safe, torch.inf), lowest, smallest) & ~safe
    if few_safe:
        safe = _lowest((-scores).masked_fill(suspicious, torch.inf), highest, smallest) & ~suspicious
    return Partition(suspicious, safe, rule, crowded or few_suspicious or few_safe)
