"""Alignment and head-wise fine-tuning: what may move moves, and nothing else, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offline_purify.heads.align import AlignConfig, align, alignment_loss, alignment_masks
from offline_purify.heads.finetune import HeadwiseRates, ScaledUpdates, finetune_heads
from offline_purify.heads.layout import HeadLayout, random_partition_like
from offline_purify.heads.partition import Partition
from offline_purify.train import Example
from tests.offline_purify.heads.body import small_suspect

EXAMPLES = [Example((1, 4, 7, 8, 9, 5), (11, 12, 2)), Example((1, 4, 20, 5), (13, 2))]
ROWS = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"


def heads(*pairs):
    mask = torch.zeros(2, 8, dtype=torch.bool)
    for layer, head in pairs:
        mask[layer, head] = True
    return mask


@pytest.fixture
def body(tmp_path):
    return small_suspect(tmp_path)


def test_only_q_and_k_slices_of_suspicious_heads_move_and_all_else_stays_bitwise(body):
    # kv head 0 serves query heads 0 and 1, kv head 1 serves 2 and 3, kv head 3 serves 6 and 7.
    parts = Partition(heads((0, 0), (0, 2), (1, 6)), heads((0, 3), (1, 5)), "tau", False)
    before = body.state()
    for _ in align(body, EXAMPLES, parts, AlignConfig(lr=1e-2, checkpoints=(2, 4))):
        pass
    size, after = body.layout.head_dim, body.state()
    allowed = {
        ROWS.format(0, "q", "B"): [0, 2],
        ROWS.format(0, "k", "B"): [0],  # kv head 1 is shared with the safe head 3
        ROWS.format(1, "q", "B"): [6],
        ROWS.format(1, "k", "B"): [3],
    }
    for name, old in before.items():
        rows = torch.zeros(old.shape[0], dtype=torch.bool)
        for unit in allowed.get(name, []):
            rows[unit * size : (unit + 1) * size] = True
        assert torch.equal(after[name][~rows], old[~rows]), name
        if name in allowed:
            assert not torch.equal(after[name][rows], old[rows]), name


def test_the_reference_is_the_detached_mean_of_the_safe_heads():
    torch.manual_seed(0)
    logits = [torch.randn(2, 8, 5, 5, requires_grad=True) for _ in range(2)]
    blocked = torch.ones(5, 5).triu(1).bool()
    attentions = [x.masked_fill(blocked, -torch.inf).softmax(-1) for x in logits]
    parts = Partition(heads((0, 1)), heads((0, 4), (0, 5), (1, 7)), "tau", False)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 4:] = 0
    loss = alignment_loss(attentions, parts, mask)
    loss.backward()
    total = entries = 0.0
    for n, length in ((0, 5), (1, 4)):
        for t in range(length):
            for c in range(t + 1):
                mean = (attentions[0][n, 4, t, c] + attentions[0][n, 5, t, c]).item() / 2
                total += (attentions[0][n, 1, t, c].item() - mean) ** 2
                entries += 1
    assert loss.item() == pytest.approx(total / entries, rel=1e-5)
    moved = logits[0].grad.abs().sum((0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == [1]
    assert logits[1].grad is None


def test_the_alignment_loss_falls(body):
    parts = Partition(heads((0, 0), (1, 6)), heads((0, 4), (1, 5)), "tau", False)
    losses: list[float] = []
    for _, so_far in align(body, EXAMPLES, parts, AlignConfig(lr=2e-2, checkpoints=(30,))):
        losses = so_far
    assert losses[-1] < 0.7 * losses[0]


def test_alignment_of_an_adapter_without_q_and_k_says_that_it_has_nothing_to_move(tmp_path):
    body = small_suspect(tmp_path, targets=("v_proj", "down_proj"))
    parts = Partition(heads((0, 0)), heads((0, 4)), "tau", False)
    with pytest.raises(ValueError, match="neither q nor k"):
        next(align(body, EXAMPLES, parts, AlignConfig()))


def test_key_rows_of_a_group_with_a_safe_head_are_left_alone(body):
    parts = Partition(heads((0, 2)), heads((0, 3)), "tau", False)
    masks = alignment_masks(body, parts)
    assert not bool(masks[ROWS.format(0, "k", "B")].any())
    assert bool(masks[ROWS.format(0, "q", "B")].any())


def test_scaling_gradients_does_nothing_under_adam_and_scaling_updates_does():
    def step(scale_gradient: float, scale_update: float) -> float:
        p = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0)
        updates = ScaledUpdates({"p": p}, {"p": torch.full((4,), scale_update)})
        (p.pow(2).sum() * scale_gradient).backward()
        updates.before()
        optimizer.step()
        updates.after()
        return 1 - p[0].item()

    assert step(0.01, 1.0) == pytest.approx(step(1.0, 1.0), rel=1e-4)
    assert step(1.0, 0.01) == pytest.approx(0.01 * step(1.0, 1.0), rel=1e-4)


def test_each_head_moves_in_proportion_to_its_rate_and_shared_factors_not_at_all(body):
    parts = Partition(heads((0, 0)), heads((0, 7)), "tau", False)
    before = body.state()
    finetune_heads(body, EXAMPLES, parts, HeadwiseRates(low=0.0, mid=1e-3, high=2e-3), epochs=1, batch_size=2)
    after, size = body.state(), body.layout.head_dim
    moved = (after[ROWS.format(0, "q", "B")] - before[ROWS.format(0, "q", "B")]).abs().view(8, size, -1).amax((1, 2))
    assert moved[0] == 0
    assert moved[7] == pytest.approx(2 * moved[3].item(), rel=1e-3)  # Adam's first step is lr * sign of the gradient
    assert torch.equal(after[ROWS.format(0, "k", "B")][:size], before[ROWS.format(0, "k", "B")][:size])
    for name in before:
        if ".down_proj." in name or name in (ROWS.format(0, "q", "A"), ROWS.format(0, "o", "B")):
            assert torch.equal(after[name], before[name])


def test_a_kv_head_takes_the_smallest_rate_of_its_query_heads():
    layout = HeadLayout(1, 8, 4, 8)
    values = torch.tensor([[0.1, 0.9, 1.0, 1.0, 0.5, 0.2, 1.0, 0.0]])
    assert layout.kv_minimum(values).tolist() == [pytest.approx([0.1, 1.0, 0.2, 0.0])]


def test_random_controls_have_as_many_heads_and_no_overlap():
    suspicious, safe = random_partition_like(heads((0, 0), (1, 1)), heads((0, 4), (1, 5), (1, 6)), seed=5)
    assert int(suspicious.sum()) == 2
    assert int(safe.sum()) == 3
    assert not bool((suspicious & safe).any())
