"""The focus that a probe should report, from the rows of one eager forward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def dense_focus(rows: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """Focus [T_p] of rows [L, H, T, T_p] from the last prompt position on, and of the groups [L, H, g, T_p] before it:
    each row's strongest head, a group's mean row for a fifth."""
    before = sum(group.amax(1).mean(1).sum(0) for group in earlier)
    return rows.amax(1).sum((0, 1)) + 0.2 * before
