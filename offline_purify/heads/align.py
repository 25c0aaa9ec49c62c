"""Attention alignment: pull the suspicious heads' attention to the mean attention of the safe heads (paper, eqs. 6, 7).

    L = mean over suspicious heads and valid entries of ( A_h - stop_gradient(mean over safe heads of A) )^2

Attention matrices, not head outputs. The reference is the mean of the safe heads of the same layer, or of all layers
where a layer has none, detached and recomputed at every step. Only the q rows of suspicious heads move, and the k rows
of a key head that no safe head shares; no weight decay, and everything else stays bitwise as it was. The loss is no
stop criterion (it keeps falling while the backdoor comes back), so the caller looks at every checkpoint.

Shapes: n rows in a batch, T tokens, H query heads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offline_purify.heads.finetune import ScaledUpdates
from offline_purify.heads.partition import Partition
from offline_purify.train import Example, collate

if TYPE_CHECKING:
    from offline_purify.patient import Patient
    from offline_purify.suspect import Suspect


@dataclass(frozen=True)
class AlignConfig:
    """Adam's learning rate, the steps after which the model is looked at (the last one ends it), batch size, seed."""

    lr: float = 1e-3
    checkpoints: tuple[int, ...] = (10, 20, 40, 80)
    batch_size: int = 8
    seed: int = 0


def valid_entries(attention_mask: Tensor, window: int | None = None, causal: bool = True) -> Tensor:
    """Entries of rows and columns that are no padding, and unless the model is an encoder causal ones alone (within a
    layer's sliding window): mask [n, T] -> bool [n, 1, T, T]."""
    real = attention_mask.bool()
    visible = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device)
    if causal:
        visible = visible.tril()
    if window is not None:
        visible = visible.triu(1 - window)
    return (visible & real[:, None, :] & real[:, :, None])[:, None]


def alignment_loss(
    attentions: Sequence[Tensor],
    parts: Partition,
    attention_mask: Tensor,
    windows: Sequence[int | None] = (),
    causal: bool = True,
) -> Tensor:
    """Mean squared distance of suspicious heads to the detached safe mean; ``attentions`` L times [n, H, T, T]."""
    every_safe = [a[:, parts.safe[layer]].detach() for layer, a in enumerate(attentions) if parts.safe[layer].any()]
    overall = torch.cat(every_safe, 1).mean(1, keepdim=True)
    total = attentions[0].new_zeros(())
    entries = attentions[0].new_zeros(())
    for layer, attention in enumerate(attentions):
        if not parts.suspicious[layer].any():
            continue
        safe = parts.safe[layer]
        valid = valid_entries(attention_mask, windows[layer] if windows else None, causal)
        target = attention[:, safe].detach().mean(1, keepdim=True) if safe.any() else overall
        gap = (attention[:, parts.suspicious[layer]] - target) * valid
        total = total + gap.pow(2).sum()
        entries = entries + valid.sum() * parts.suspicious[layer].sum().to(entries.device)
    return total / entries.clamp(min=1)


def alignment_masks(suspect: Patient, parts: Partition) -> dict[str, Tensor]:
    """1 on the q and k slices that alignment may move, 0 elsewhere, by parameter name."""
    return suspect.layout.masks(
        suspect.parameters(),
        parts.suspicious.float(),
        suspect.layout.kv_alignable(parts.suspicious, parts.safe).float(),
        projections="qk",
    )


def align(
    suspect: Suspect,
    examples: Sequence[Example],
    parts: Partition,
    config: AlignConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """Align in place, yielding (step, losses so far) at each checkpoint; stop iterating to keep the model as it is.

    Raises ValueError when no parameter of the suspect shapes a suspicious head's attention.
    """

    def loss_of(indices: list[int]) -> Tensor:
        batch = collate([examples[i] for i in indices], suspect.pad_id, suspect.device)
        with suspect.attention_matrices():
            out = suspect.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                output_attentions=True,
            )
            return alignment_loss(out.attentions, parts, batch["attention_mask"], suspect.layout.windows)

    yield from align_slices(suspect, parts, len(examples), loss_of, config, progress)


def align_slices(
    suspect: Patient,
    parts: Partition,
    n: int,
    loss_of: Callable[[list[int]], Tensor],
    config: AlignConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """The steps of ``align`` for any model with heads: ``loss_of(indices)`` is the loss of some of its ``n`` inputs."""
    masks = alignment_masks(suspect, parts)
    masks = {name: mask for name, mask in masks.items() if bool(mask.any())}
    if not masks:
        raise ValueError("the suspect changes neither q nor k of a suspicious head: alignment has nothing to move")
    if not bool(parts.safe.any()):
        raise ValueError("no safe head to align to")
    parameters = {name: p for name, p in suspect.parameters().items() if name in masks}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.lr)
    updates = ScaledUpdates(parameters, masks)
    rng = random.Random(config.seed)
    losses: list[float] = []
    order: list[int] = []
    total = max(config.checkpoints)
    for p in parameters.values():
        p.requires_grad_(True)
    try:
        for step in range(1, total + 1):
            if len(order) < min(config.batch_size, n):
                order = rng.sample(range(n), n)
            chunk = [order.pop() for _ in range(min(config.batch_size, n))]
            with torch.enable_grad():
                loss = loss_of(chunk)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            updates.before()
            optimizer.step()
            updates.after()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress("aligning heads", step, total)
            if step in config.checkpoints:
                yield step, losses
    finally:
        for p in parameters.values():
            p.grad = None
            p.requires_grad_(False)
