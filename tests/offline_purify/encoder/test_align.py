"""Alignment and head-wise fine-tuning of an encoder: what may move moves, and nothing else, bit for bit."""

from __future__ import annotations

import pytest
import torch

from offline_purify.encoder.align import align, finetune_heads
from offline_purify.encoder.classifier import Sample
from offline_purify.heads.align import AlignConfig, alignment_loss
from offline_purify.heads.finetune import HeadwiseRates
from offline_purify.heads.partition import Partition
from tests.offline_purify.encoder.body import small_classifier

SAMPLES = [Sample((2, 7, 20, 12, 33, 3), 1), Sample((2, 15, 6, 3), 0)]
SLICE = "bert.encoder.layer.{}.attention.{}"


def heads(*pairs):
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for layer, head in pairs:
        mask[layer, head] = True
    return mask


PARTS = Partition(heads((0, 0), (1, 2)), heads((0, 3), (1, 1)), "tau", False)


@pytest.fixture
def body(tmp_path):
    return small_classifier(tmp_path)


def owned(body, old, name, units):
    """Elements of a tensor that belong to some heads: rows, or columns of the output projection."""
    size = body.layout.head_dim
    mask = torch.zeros_like(old, dtype=torch.bool)
    for unit in units:
        line = slice(unit * size, (unit + 1) * size)
        if "output.dense.weight" in name:
            mask[:, line] = True
        else:
            mask[line] = True
    return mask


def test_only_query_and_key_slices_of_suspicious_heads_move_and_all_else_stays_bitwise(body):
    before = body.state()
    for _ in align(body, SAMPLES, PARTS, AlignConfig(lr=1e-2, checkpoints=(2, 4))):
        pass
    after = body.state()
    allowed = {
        SLICE.format(layer, f"self.{what}.{kind}"): [head]
        for layer, head in ((0, 0), (1, 2))
        for what in ("query", "key")
        for kind in ("weight", "bias")
    }
    assert allowed.keys() <= before.keys()
    for name, old in before.items():
        mine = owned(body, old, name, allowed.get(name, []))
        assert torch.equal(after[name][~mine], old[~mine]), name
        if name in allowed and "key.bias" not in name:  # softmax cancels a bias that all keys share
            assert not torch.equal(after[name][mine], old[mine]), name


def test_the_loss_compares_all_entries_between_real_tokens_with_the_detached_safe_mean():
    torch.manual_seed(0)
    logits = [torch.randn(2, 4, 5, 5, requires_grad=True) for _ in range(2)]
    attentions = [x.softmax(-1) for x in logits]
    parts = Partition(heads((0, 1)), heads((0, 0), (0, 3)), "tau", False)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    loss = alignment_loss(attentions, parts, mask, causal=False)
    loss.backward()
    total = entries = 0.0
    for n, length in ((0, 5), (1, 3)):
        for t in range(length):
            for c in range(length):
                mean = (attentions[0][n, 0, t, c] + attentions[0][n, 3, t, c]).item() / 2
                total += (attentions[0][n, 1, t, c].item() - mean) ** 2
                entries += 1
    assert loss.item() == pytest.approx(total / entries, rel=1e-5)
    assert (logits[0].grad.abs().sum((0, 2, 3)) > 0).nonzero().flatten().tolist() == [1]
    assert logits[1].grad is None


def test_the_alignment_loss_falls(body):
    losses: list[float] = []
    for _, so_far in align(body, SAMPLES, PARTS, AlignConfig(lr=2e-2, checkpoints=(30,))):
        losses = so_far
    assert losses[-1] < 0.7 * losses[0]


def test_an_empty_set_of_heads_is_an_error(body):
    with pytest.raises(ValueError, match="no safe head"):
        next(align(body, SAMPLES, Partition(heads((0, 0)), heads(), "tau", False), AlignConfig()))


def test_each_head_moves_in_proportion_to_its_rate_and_the_rest_not_at_all(body):
    before = body.state()
    rates = HeadwiseRates(low=0.0, mid=1e-3, high=2e-3)
    finetune_heads(body, SAMPLES, PARTS, rates, epochs=1, batch_size=2)
    after, size = body.state(), body.layout.head_dim
    for what, dim in (("self.query.weight", 0), ("self.value.weight", 0), ("output.dense.weight", 1)):
        name = SLICE.format(0, what)
        steps = [part.abs().amax() for part in (after[name] - before[name]).split(size, dim)]
        assert steps[0] == 0
        assert steps[3] == pytest.approx(2 * steps[1].item(), rel=1e-2)  # Adam's first step is lr * sign
    for name in before:
        if ".attention." not in name or "LayerNorm" in name or name.endswith("output.dense.bias"):
            assert torch.equal(after[name], before[name]), name
