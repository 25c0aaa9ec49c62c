"""Head scores of an encoder against finite differences and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from offline_purify.encoder.classifier import Sample
from offline_purify.encoder.scores import gradient_sensitivity, head_grams, score_heads
from offline_purify.heads.scores import head_similarity
from tests.offline_purify.encoder.body import small_classifier

SAMPLES = [Sample((2, 7, 20, 12, 33, 3), 1), Sample((2, 15, 6, 3), 0), Sample((2, 40, 8, 3), 1)]


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return small_classifier(tmp_path_factory.mktemp("body"))


def loss_with_head_scaled(body, sample: Sample, layer: int, head: int, factor: float) -> float:
    size = body.layout.head_dim

    def scale(module, inputs):
        heads = inputs[0].clone()
        heads[..., head * size : (head + 1) * size] *= factor
        return (heads, *inputs[1:])

    hook = body.projections[layer].register_forward_pre_hook(scale)
    try:
        with torch.no_grad():
            batch = body.collate([sample])
            return float(cross_entropy(body.forward(batch).logits, batch["labels"]))
    finally:
        hook.remove()


def test_the_sensitivity_of_a_head_is_the_slope_of_the_loss_when_its_output_is_scaled(body):
    measured = gradient_sensitivity(body, SAMPLES)
    eps = 1e-2
    for layer in range(body.layout.layers):
        for head in range(body.layout.heads):
            slopes = [
                (
                    loss_with_head_scaled(body, s, layer, head, 1 + eps)
                    - loss_with_head_scaled(body, s, layer, head, 1 - eps)
                )
                / (2 * eps)
                for s in SAMPLES
            ]
            expected = sum(abs(slope) for slope in slopes) / len(slopes)
            assert float(measured[layer, head]) == pytest.approx(expected, rel=0.02, abs=2e-5)
    assert float(measured.max()) > 1e-3


def test_the_absolute_value_is_taken_per_sample_before_the_mean(body):
    each = [gradient_sensitivity(body, [s]) for s in SAMPLES]
    assert torch.allclose(gradient_sensitivity(body, SAMPLES), sum(each) / 3, atol=1e-6)


def test_scoring_leaves_neither_gradients_nor_hooks_behind(body):
    gradient_sensitivity(body, SAMPLES)
    assert all(p.grad is None and not p.requires_grad for p in body.model.parameters())
    assert not any(m._forward_pre_hooks for m in body.projections)


def test_similarity_is_the_cosine_of_whole_attention_matrices_without_padding(body):
    similarity = head_similarity(head_grams(body, SAMPLES))
    for n, sample in enumerate(SAMPLES):
        with torch.no_grad(), body.attention_matrices():
            attentions = body.model(input_ids=torch.tensor([sample.ids]), output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            rows = attention[0].double()
            for head in range(body.layout.heads):
                cosines = [
                    float((rows[head] * rows[j]).sum() / (rows[head].norm() * rows[j].norm()))
                    for j in range(body.layout.heads)
                    if j != head
                ]
                assert math.isclose(float(similarity[n, layer, head]), max(cosines), abs_tol=1e-5)


def test_scores_have_one_value_per_layer_and_head(body):
    scores = score_heads(body, SAMPLES)
    assert scores.safety.shape == (2, 4)
    assert bool(scores.safety.isfinite().all())
