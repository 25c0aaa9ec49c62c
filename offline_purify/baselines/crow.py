"""CROW: fine-tuning on clean rows that also asks hidden states to change little from layer to layer, under attack.

Min et al. 2024. Per step: consistency C(e), the mean of 1 - cos of neighbouring inner layers' states; embeddings moved
by epsilon along the sign of its gradient; loss = LM(clean) + a C(e'). Two traps of the published code are avoided
(reference/backdoor-methods.md §4.6, §11.3): padding does not count, and only embeddings get the first gradient. Its
epsilon of 0.1 is absolute; here it is ``_EPSILON`` times the embeddings' mean magnitude, which differs between models.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offline_purify.baselines.budget import Budget
from offline_purify.stage import Material
from offline_purify.train import answer_losses, collate, encode_rows, index_batches, learning_rate

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect

_WEIGHT = 5.5  # the published a for sentiment steering
_EPSILON = 0.1


def consistency(states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Mean over tokens and pairs of 1 - cos of hidden states of neighbouring layers, the embeddings and the last layer
    left out. states: L + 1 times [R, T, D]; mask [R, T]. A model of fewer than three layers has no pair: 0."""
    inner = states[1:-1]
    if len(inner) < 2:
        return states[0].new_zeros(())
    apart = torch.stack([1 - torch.cosine_similarity(a, b, dim=-1) for a, b in pairwise(inner)])
    return (apart * mask).sum() / (mask.sum() * len(apart))


def crow(suspect: Suspect, material: Material, budget: Budget) -> dict[str, Any]:
    """Fine-tune the suspect in place with the consistency term."""
    config = replace(budget.training, seed=material.seed)
    examples = encode_rows(suspect.tokenizer, budget.clean(material))
    factors = list(suspect.parameters().values())
    model: Any = suspect.model
    embed = model.get_input_embeddings()
    steps = list(index_batches(examples, config))
    optimizer = torch.optim.AdamW(factors, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    terms: list[float] = []
    for factor in factors:
        factor.requires_grad_(True)
    try:
        for number, indices in enumerate(steps):
            batch = collate([examples[i] for i in indices], suspect.pad_id, suspect.device)
            mask = batch["attention_mask"]
            moved = _moved(model, embed(batch["input_ids"]).detach(), mask)
            sums, counts = answer_losses(model(**_inputs(batch), use_cache=False).logits, batch["labels"])
            out = model(inputs_embeds=moved, attention_mask=mask, output_hidden_states=True, use_cache=False)
            term = consistency(out.hidden_states, mask)
            loss = sums.sum() / counts.sum().clamp(min=1) + _WEIGHT * term
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(factors, config.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, len(steps), config)
            optimizer.step()
            terms.append(float(term.detach()))
            if material.progress is not None:
                material.progress("CROW", number + 1, len(steps))
    finally:
        for factor in factors:
            factor.requires_grad_(False)
            factor.grad = None
    return {"steps": len(steps), "consistency": [terms[0], terms[-1]] if terms else []}


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _moved(model: Any, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Embeddings [R, T, D] a step against consistency."""
    leaf = embeddings.clone().requires_grad_(True)
    out = model(inputs_embeds=leaf, attention_mask=mask, output_hidden_states=True, use_cache=False)
    apart = consistency(out.hidden_states, mask)
    if not apart.requires_grad:
        return embeddings
    (gradient,) = torch.autograd.grad(apart, leaf)
    return embeddings + _EPSILON * embeddings.abs().mean() * gradient.sign()
