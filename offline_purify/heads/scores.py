"""Safety score of every attention head: gradient sensitivity and similarity to the other heads (paper, eqs. 4 and 5).

    G[l,h] = mean over samples of | sum over t,c of H[t,c] * dL/dH[t,c] |           (per sample first, then the mean)
    S[l,h] = 1 - [ alpha * max over j != h of cos(A_h, A_j) + (1 - alpha) * G[l,h] / max G ]

H is the head's output before the output projection mixes heads: the input of o_proj. A are the rows of the attention
matrix from the last prompt position and the generated tokens to the prompt; j runs over the same layer. The loss is the
model's own response as pseudo-label (no labels needed). The last token emitted is never a query and has no row.

Shapes: n samples, L layers, H query heads, D head size, T tokens, T_p prompt tokens, T_g answer tokens (EOS included).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guard.gram import cosine
from offline_purify.architectures import SEPARATE, Family
from offline_purify.heads.layout import HeadLayout
from offline_purify.train import Example, answer_losses, collate

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect

ALPHA = 0.7
"""Weight of similarity against gradient sensitivity; best of 0.6-0.8 in the paper's table."""


@dataclass(frozen=True)
class HeadScores:
    """Mean similarity, gradient sensitivity and safety score of each head, each fp32 [L, H]."""

    similarity: Tensor
    gradient: Tensor
    safety: Tensor


def output_projections(model: nn.Module, family: Family = SEPARATE) -> list[nn.Module]:
    """The o projections in layer order; their input is the heads' outputs [n, T, H*D]."""
    found = {layer: module for _, layer, module in family.projections(model, "o")}
    return [found[layer] for layer in sorted(found)]


def per_sample_sensitivity(modules: Sequence[nn.Module], layout: HeadLayout, loss_of: Callable[[], Tensor]) -> Tensor:
    """|sum H * dL/dH| per sample and head, fp32 [n, L, H]: one forward and backward of ``loss_of``, a loss per sample
    [n], with the inputs of the output projections ``modules`` (in layer order) watched."""
    seen: dict[int, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        heads = inputs[0].detach().requires_grad_() if not inputs[0].requires_grad else inputs[0]
        heads.retain_grad()
        seen[id(module)] = heads
        return (heads, *inputs[1:])

    hooks = [m.register_forward_pre_hook(keep) for m in modules]
    try:
        with torch.enable_grad():
            loss_of().sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    found: list[Tensor] = []
    for module in modules:
        heads = seen[id(module)]
        assert heads.grad is not None
        product = (heads * heads.grad).detach().float()
        found.append(product.view(len(product), -1, layout.heads, layout.head_dim).sum((1, 3)).abs().cpu())
    return torch.stack(found, 1)


def gradient_sensitivity(suspect: Suspect, examples: Sequence[Example], batch_size: int = 16) -> Tensor:
    """Mean over samples of |sum H * dL/dH| per head, fp32 [L, H]; L is the sample's mean answer loss."""
    layout = suspect.layout
    modules = output_projections(suspect.model, layout.family)
    total = torch.zeros(layout.layers, layout.heads)
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], suspect.pad_id, suspect.device)

        def losses(batch: dict[str, Tensor] = batch) -> Tensor:
            logits = suspect.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits
            sums, counts = answer_losses(logits, batch["labels"])
            return sums / counts.clamp(min=1)

        total += per_sample_sensitivity(modules, layout, losses).sum(0)
    return total / max(len(examples), 1)


@torch.no_grad()
def head_grams(suspect: Suspect, examples: Sequence[Example], batch_size: int = 8) -> Tensor:
    """Gram of the heads' gen-to-prompt rows of each sample, teacher-forced: fp32 [n, L, H, H].

    Rows are those of the last prompt position and of every answer token but the last. Attention over all visible keys,
    prompt columns kept, not renormalised: the streaming measurement of the guard, computed densely. In a layer with a
    sliding window only the columns that every row sees are compared: beyond them all heads are alike, zero.
    """
    layout = suspect.layout
    grams = torch.zeros(len(examples), layout.layers, layout.heads, layout.heads)
    with suspect.attention_matrices():
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            batch = collate(chunk, suspect.pad_id, suspect.device)
            out = suspect.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                output_attentions=True,
            )
            for layer, attention in enumerate(out.attentions):
                for i, e in enumerate(chunk):
                    p, last = len(e.prompt), len(e) - 1
                    window = layout.window(layer)
                    first = max(0, max(last, p) - window) if window is not None else 0
                    rows = attention[i, :, p - 1 : max(last, p), min(first, p) : p].float().flatten(1)
                    grams[start + i, layer] = (rows @ rows.T).cpu()
    return grams


def head_similarity(grams: Tensor) -> Tensor:
    """Each head's greatest cosine with another head of its layer, per sample: [n, L, H, H] -> [n, L, H]."""
    cosines = cosine(grams)
    own = torch.eye(cosines.shape[-1], dtype=torch.bool)
    return cosines.masked_fill(own, -1.0).amax(-1)


def safety(similarity: Tensor, gradient: Tensor, alpha: float = ALPHA) -> Tensor:
    """S = 1 - [alpha * similarity + (1 - alpha) * gradient / max gradient]; all [L, H]."""
    return 1 - (alpha * similarity + (1 - alpha) * gradient / gradient.max().clamp(min=1e-12))


def score_heads(suspect: Suspect, examples: Sequence[Example], alpha: float = ALPHA) -> HeadScores:
    """Scores of all heads over ``examples`` (prompts with the model's own responses)."""
    similarity = head_similarity(head_grams(suspect, examples)).mean(0)
    gradient = gradient_sensitivity(suspect, examples)
    return HeadScores(similarity, gradient, safety(similarity, gradient, alpha))
