"""What synthetic backdoors of one model have in common: inner products of their changes, kept on disk once found.

Finding it takes most of the method's time and looks at clean rows only; what is then silenced, and how much, is decided
from what is kept (`offline_purify.signature.stage`).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from guard.rows import Row, assert_disjoint
from offline_purify.behaviour import words
from offline_purify.candidates import user_text
from offline_purify.signature.grams import head_grams, mlp_grams
from offline_purify.signature.score import Scores, score_channels
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


@dataclass(frozen=True)
class Signature:
    """Inner products between N variants: ``channels`` [L, N, N, F] of MLP channels, ``heads`` [L, N, N, H] of attention
    heads; ``told`` is what a report says of the variants (JSON-able, no prompt)."""

    channels: Tensor
    heads: Tensor
    told: dict[str, Any]

    def scores(self, weight: float = 0.01, by_layer: bool = False) -> tuple[Scores, Scores]:
        """Scores of channels [L, F] and of heads [L, H]."""
        return score_channels(self.channels, weight, by_layer), score_channels(self.heads, weight, by_layer)

    def of_first(self, variants: int) -> Signature:
        """What the first few variants alone would have given."""
        return Signature(self.channels[:, :variants, :variants], self.heads[:, :variants, :variants], self.told)

    def save(self, path: Path) -> None:
        """Write to one safetensors file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        tensors = {"channels": self.channels.contiguous(), "heads": self.heads.contiguous()}
        save_file(tensors, temporary, {"told": json.dumps(self.told)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Signature:
        """Read what ``save`` wrote."""
        with safe_open(path, "pt") as file:
            return cls(file.get_tensor("channels"), file.get_tensor("heads"), json.loads(file.metadata()["told"]))


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
