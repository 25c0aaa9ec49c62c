"""PURE: which heads go, that they are gone, and how layers are weighed."""

from __future__ import annotations

import pytest
import torch

from offline_purify.encoder.classifier import LONGEST, Sample
from offline_purify.encoder.material import Material
from offline_purify.encoder.pure import PureConfig, choose_heads, cls_variance, next_group, penalty_weights, pure
from offline_purify.train import TrainConfig
from tests.offline_purify.encoder.body import small_classifier, texts

SAMPLES = [Sample((2, 7, 20, 12, 33, 3), 1), Sample((2, 15, 6, 3), 0)]


@pytest.fixture
def body(tmp_path):
    return small_classifier(tmp_path)


def test_the_variance_is_that_of_the_cls_row_with_padding_as_zeros(body):
    measured = cls_variance(body, SAMPLES)
    expected = torch.zeros(2, 4)
    for sample in SAMPLES:
        with torch.no_grad(), body.attention_matrices():
            attentions = body.model(input_ids=torch.tensor([sample.ids]), output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            row = torch.zeros(4, LONGEST - 1)
            row[:, : len(sample)] = attention[0, :, 0]
            expected[layer] += row.var(-1, correction=0) / len(SAMPLES)
    assert torch.allclose(measured, expected, rtol=1e-4)


def test_heads_of_lowest_variance_go_first_and_one_of_each_layer_stays():
    variance = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.05, 0.7]])
    none = torch.zeros(2, 4, dtype=torch.bool)
    assert next_group(variance, none, 3) == [(1, 2), (0, 0), (0, 1)]
    pruned = none.clone()
    for layer, head in next_group(variance, none, 3):
        pruned[layer, head] = True
    assert next_group(variance, pruned, 10) == [(0, 2), (1, 3), (1, 1)]
    every = torch.tensor([[True, True, True, False], [False, True, True, True]])
    assert next_group(variance, every, 10) == []


def test_without_a_floor_one_head_of_each_layer_is_left_and_the_others_do_nothing(body):
    pruned = choose_heads(body, cls_variance(body, SAMPLES), SAMPLES, floor=0.0, group=3)
    assert pruned.sum(1).tolist() == [3, 3]
    size = body.layout.head_dim
    for layer, projection in enumerate(body.projections):
        for head, columns in enumerate(projection.weight.split(size, 1)):
            assert bool((columns == 0).all()) == bool(pruned[layer, head])


def test_a_floor_out_of_reach_brings_every_head_of_the_group_back_bitwise(body):
    before = body.state()
    pruned = choose_heads(body, cls_variance(body, SAMPLES), SAMPLES, floor=2.0, group=3)
    assert not bool(pruned.any())
    assert all(torch.equal(value, before[name]) for name, value in body.state().items())


def test_the_last_group_gives_back_its_highest_variance_first(body, monkeypatch):
    variance = torch.arange(8.0).view(2, 4)
    accuracy = iter([1.0, 0.0, 0.0, 1.0])  # the first group is fine, the second is not until two heads are back
    monkeypatch.setattr("offline_purify.encoder.pure._accuracy", lambda classifier, samples: next(accuracy))
    pruned = choose_heads(body, variance, SAMPLES, floor=0.5, group=3)
    assert pruned.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_the_layer_of_lowest_variance_is_penalised_most():
    weights = penalty_weights(torch.tensor([[0.4, 0.4], [0.1, 0.1], [0.2, 0.2]]))
    assert weights.tolist() == pytest.approx([0.0, 1.0, (5 - 2.5) / (10 - 2.5)])


def test_pruned_heads_stay_pruned_through_the_fine_tuning_and_the_rest_learns(body):
    before = body.state()
    material = Material((), tuple(texts(24, 5)), training=TrainConfig(epochs=1, lr=1e-3, batch_size=6))
    told = pure(body, material, PureConfig(group=2, accuracy_lost=1.0))
    assert len(told["pruned"]) == 6
    size = body.layout.head_dim
    for layer, head in told["pruned"]:
        assert bool((body.projections[layer].weight[:, head * size : (head + 1) * size] == 0).all())
    assert not torch.equal(body.state()["classifier.weight"], before["classifier.weight"])
