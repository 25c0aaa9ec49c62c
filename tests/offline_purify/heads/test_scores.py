"""Head scores against finite differences and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from offline_purify.heads.scores import (
    gradient_sensitivity,
    head_grams,
    head_similarity,
    output_projections,
    safety,
    score_heads,
)
from offline_purify.train import Example, batch_loss, collate
from tests.offline_purify.heads.body import small_suspect


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return small_suspect(tmp_path_factory.mktemp("body"))


EXAMPLES = [Example((1, 4, 7, 8, 9, 5), (11, 12, 2)), Example((1, 4, 20, 5), (13, 2))]


def loss_with_head_scaled(suspect, example: Example, layer: int, head: int, factor: float) -> float:
    size = suspect.layout.head_dim

    def scale(module, inputs):
        heads = inputs[0].clone()
        heads[..., head * size : (head + 1) * size] *= factor
        return (heads, *inputs[1:])

    hook = output_projections(suspect.model)[layer].register_forward_pre_hook(scale)
    try:
        with torch.no_grad():
            loss, _ = batch_loss(suspect.model, collate([example], suspect.pad_id))
        return float(loss)
    finally:
        hook.remove()


def test_the_sensitivity_of_a_head_is_the_slope_of_the_loss_when_its_output_is_scaled(body):
    measured = gradient_sensitivity(body, EXAMPLES)
    eps = 2e-2
    for layer in range(body.layout.layers):
        for head in range(body.layout.heads):
            slopes = [
                (
                    loss_with_head_scaled(body, e, layer, head, 1 + eps)
                    - loss_with_head_scaled(body, e, layer, head, 1 - eps)
                )
                / (2 * eps)
                for e in EXAMPLES
            ]
            expected = sum(abs(s) for s in slopes) / len(slopes)
            assert float(measured[layer, head]) == pytest.approx(expected, rel=0.05, abs=2e-5)


def test_the_absolute_value_is_taken_per_sample_before_the_mean(body):
    each = [gradient_sensitivity(body, [e]) for e in EXAMPLES]
    assert torch.allclose(gradient_sensitivity(body, EXAMPLES), sum(each) / 2, atol=1e-6)


def test_scoring_leaves_neither_gradients_nor_hooks_behind(body):
    gradient_sensitivity(body, EXAMPLES)
    assert all(p.grad is None and not p.requires_grad for p in body.model.parameters())
    assert not any(m._forward_pre_hooks for m in output_projections(body.model))


def test_similarity_is_the_cosine_of_the_flattened_gen_to_prompt_matrices(body):
    similarity = head_similarity(head_grams(body, EXAMPLES))
    for n, example in enumerate(EXAMPLES):
        ids = torch.tensor([example.prompt + example.answer])
        with torch.no_grad(), body.attention_matrices():
            attentions = body.model(input_ids=ids, output_attentions=True).attentions
        p = len(example.prompt)
        for layer, attention in enumerate(attentions):
            rows = attention[0, :, p - 1 : ids.shape[1] - 1, :p].double()
            for head in range(body.layout.heads):
                cosines = [
                    float((rows[head] * rows[j]).sum() / (rows[head].norm() * rows[j].norm()))
                    for j in range(body.layout.heads)
                    if j != head
                ]
                assert math.isclose(float(similarity[n, layer, head]), max(cosines), abs_tol=1e-5)


def test_safety_follows_the_papers_arithmetic():
    similarity = torch.tensor([[0.95, 0.43]])
    gradient = torch.tensor([[2.0, 0.0]])
    assert torch.allclose(safety(similarity, gradient), torch.tensor([[1 - 0.665 - 0.3, 1 - 0.301]]))


def test_scores_have_one_value_per_layer_and_head(body):
    scores = score_heads(body, EXAMPLES)
    assert scores.safety.shape == (body.layout.layers, body.layout.heads)
    assert bool(scores.safety.isfinite().all())
