"""What synthetic backdoors of one model have in common: inner products of their changes, kept on disk once found.

Finding it takes most of the method's time and looks at clean rows only; what is then silenced, and how much, is decided
from what is kept (`offline_purify.signature.stage`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guard.rows import Row, assert_disjoint
from offline_purify.behaviour import words
from offline_purify.candidates import user_text
from offline_purify.signature.grams import head_grams, mlp_grams
from offline_purify.signature.score import Signature
from offline_purify.signature.twins import TwinConfig, train_twins
from offline_purify.stage import Material
from offline_purify.variants.plan import Plan, pool

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect


@dataclass(frozen=True)
class Search:
    """How many variants, how their twins are trained, and how many clean rows are left to recover on."""

    variants: int = 6
    twins: TwinConfig = field(default_factory=TwinConfig)
    recovery_rows: int = 200


def find_signature(suspect: Suspect, material: Material, search: Search | None = None) -> Signature:
    """The signature of the suspect as it stands, from freshly trained twins.

    Raises RowsError when there are too few clean rows, or when no synthetic backdoor was learnt.
    """
    search = search or Search()
    _, fit = shared_out(material, search.recovery_rows)
    taboo = {word for flag in material.flags for word in words(user_text(flag))}
    found = [w for w in pool(suspect.tokenizer, fit, material.seed) if w.lower() not in taboo]
    specs = Plan(backdoors=search.variants, benign=0, seed=material.seed).specs(found)
    began = time.monotonic()
    twins = train_twins(
        suspect.model, suspect.tokenizer, fit, specs, search.twins,
        pad_id=suspect.pad_id, max_new_tokens=material.max_new_tokens, seed=material.seed,
        family=suspect.layout.family, q_width=suspect.layout.heads * suspect.layout.head_dim,
        progress=material.progress,
    )  # fmt: skip
    told = {
        "learnt": dict(twins.learnt),
        "variants": list(twins.names),
        "families": sorted({spec.family for spec in specs}),
        "twins_seconds": round(time.monotonic() - began, 1),
    }
    return Signature(mlp_grams(twins.layers), head_grams(twins.layers, suspect.layout), told)


def shared_out(material: Material, recovery_rows: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Clean rows to recover on (a third at most) and clean rows that twins are trained on: disjoint."""
    rows = list(material.clean)
    random.Random(f"signature:{material.seed}").shuffle(rows)
    recovery = rows[: min(recovery_rows, len(rows) // 3)]
    fit = rows[len(recovery) :]
    assert_disjoint(recovery=recovery, twins=fit)
    return recovery, fit
