"""An attacker who knows the defence: where an implant may live, and a penalty for looking like one.

Two adversaries of reference/backdoor-methods.md (§2.5, §18). One trains LoRA on the attention or on the MLP alone, so
that a repair of the other part finds nothing to repair. The other keeps what the guard measures as it was: the cosine
of every two heads' attention on a triggered prompt stays close to the base's on the same tokens,

    loss = answers' loss + w * mean over triggered rows, layers and pairs h < j of (cos(A_h, A_j) - its base's)^2

A are the rows of the attention matrix from the last prompt position and the answer's tokens (but the last, which is
never a query) to the prompt, softmax over all visible keys, prompt columns kept. Attention is eager while it is
measured, and as it was at all other times.

Shapes: n rows in a batch, T tokens (right-padded), L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from guard.gram import cosine
from offline_purify.implanting import ATTENTION, LINEAR, MLP
from offline_purify.patient import eager_attention
from offline_purify.train import Example, collate

PROJECTIONS: Final[dict[str, tuple[str, ...]]] = {"all": LINEAR, "attention": ATTENTION, "mlp": MLP}
"""Where an implant may live, by name."""


@dataclass(frozen=True)
class Evasion:
    """What an attacker does to go unnoticed: ``only`` names the projections of the adapter (all, attention or mlp),
    ``similarity`` is the weight w of the penalty (0: none)."""

    only: str = "all"
    similarity: float = 0.0

    def __post_init__(self) -> None:
        if self.only not in PROJECTIONS:
            raise ValueError(f"there are no projections {self.only!r}: choose one of {', '.join(PROJECTIONS)}.")
        if not 0 <= self.similarity < float("inf"):
            raise ValueError(f"the similarity penalty's weight is {self.similarity}; expected 0 or more.")

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections that the adapter changes."""
        return PROJECTIONS[self.only]


def head_cosines(attentions: Sequence[Tensor], examples: Sequence[Example]) -> Tensor:
    """Cosines of every two heads of a layer on the answer's rows to the prompt: L times [n, H, T, T] -> [n, L, H, H].

    Differentiable; of the precision of the attention matrices.
    """
    length = attentions[0].shape[-1]
    rows = torch.zeros(len(examples), length, device=attentions[0].device)
    columns = torch.zeros_like(rows)
    for i, e in enumerate(examples):
        rows[i, len(e.prompt) - 1 : max(len(e) - 1, len(e.prompt))] = 1
        columns[i, : len(e.prompt)] = 1
    kept = (rows[:, :, None] * columns[:, None, :])[:, None]
    grams = []
    for attention in attentions:
        heads = (attention * kept).flatten(2)
        grams.append(heads @ heads.transpose(1, 2))
    return cosine(torch.stack(grams, 1))


class SimilarityPenalty:
    """The penalty as an extra loss of `offline_purify.train`: of the examples of a batch, those that are triggered.

    ``triggered`` are the first examples of the training set; the base's cosines on them are measured once, here.
    """

    def __init__(
        self, peft_model: Any, triggered: Sequence[Example], weight: float, pad_id: int, batch_size: int = 64
    ) -> None:
        self.model, self.triggered, self.weight, self.pad_id = peft_model, list(triggered), weight, pad_id
        order = sorted(range(len(self.triggered)), key=lambda i: len(self.triggered[i]))
        self.base: dict[int, Tensor] = {}
        with torch.no_grad(), peft_model.disable_adapter():
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                self.base.update(zip(chunk, self._cosines(chunk), strict=True))

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Weighted mean squared change of the cosines over the triggered examples of a batch; 0 without any."""
        chunk = [i for i in indices if i < len(self.triggered)]
        if not chunk:
            return torch.zeros((), device=next(self.model.parameters()).device)
        now = self._cosines(chunk)
        first, second = torch.triu_indices(now.shape[-1], now.shape[-1], 1, device=now.device)
        change = now - torch.stack([self.base[i] for i in chunk])
        return self.weight * change[..., first, second].pow(2).mean()

    def _cosines(self, indices: Sequence[int]) -> Tensor:
        """Of the named examples as the model stands: [n, L, H, H]."""
        examples = [self.triggered[i] for i in indices]
        batch = collate(examples, self.pad_id, next(self.model.parameters()).device)
        with eager_attention(self.model):
            out = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                output_attentions=True,
            )
        return head_cosines(out.attentions, examples)
