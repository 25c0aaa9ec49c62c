"""Safety score of every head of an encoder: gradient sensitivity, and similarity on the whole attention matrix.

The decoders' equations (``heads.scores``) with two differences: the loss is the cross-entropy of the class that the
model itself gives the text (no labels needed), and heads are compared on all T x T entries between real tokens, as an
encoder generates nothing (reference/backdoor-methods.md §5.4).

Shapes: n texts, L layers, H heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offline_purify.encoder.classifier import Classifier, Sample
from offline_purify.heads.scores import ALPHA, HeadScores, head_similarity, per_sample_sensitivity, safety


def gradient_sensitivity(classifier: Classifier, samples: Sequence[Sample], batch_size: int = 16) -> Tensor:
    """Mean over samples of |sum H * dL/dH| per head, fp32 [L, H]; L is the cross-entropy of the sample's label."""
    layout = classifier.layout
    total = torch.zeros(layout.layers, layout.heads)
    for start in range(0, len(samples), batch_size):
        batch = classifier.collate(samples[start : start + batch_size])

        def losses(batch: dict[str, Tensor] = batch) -> Tensor:
            return cross_entropy(classifier.forward(batch).logits, batch["labels"], reduction="none")

        total += per_sample_sensitivity(classifier.projections, layout, losses).sum(0)
    return total / max(len(samples), 1)


@torch.no_grad()
def head_grams(classifier: Classifier, samples: Sequence[Sample], batch_size: int = 16) -> Tensor:
    """Gram of the heads' attention matrices between real tokens, for each sample: fp32 [n, L, H, H]."""
    layout = classifier.layout
    grams = torch.zeros(len(samples), layout.layers, layout.heads, layout.heads)
    with classifier.attention_matrices():
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            out = classifier.forward(classifier.collate(chunk), attentions=True)
            for layer, attention in enumerate(out.attentions):
                for i, sample in enumerate(chunk):
                    rows = attention[i, :, : len(sample), : len(sample)].float().flatten(1)
                    grams[start + i, layer] = (rows @ rows.T).cpu()
    return grams


def score_heads(classifier: Classifier, samples: Sequence[Sample], alpha: float = ALPHA) -> HeadScores:
    """Scores of all heads over ``samples``, whose labels are the model's own predictions where nobody knows better."""
    similarity = head_similarity(head_grams(classifier, samples)).mean(0)
    gradient = gradient_sensitivity(classifier, samples)
    return HeadScores(similarity, gradient, safety(similarity, gradient, alpha))
