"""Scores and selections: a planted signature is found, and each term alone is fooled by what the other sees."""

import pytest
import torch

from offline_purify.signature.score import random_like, score_channels, select

LAYERS, N, F, D = 3, 6, 40, 16


def grams_of(deltas):
    """deltas [L, N, F, D] -> [L, N, N, F]."""
    return torch.einsum("lnfd,lmfd->lnmf", deltas, deltas)


@pytest.fixture
def planted():
    """A shared direction in known channels; elsewhere noise, loud decoys without a direction, tiny ones with one."""
    rng = torch.Generator().manual_seed(0)
    deltas = 0.1 * torch.randn(LAYERS, N, F, D, generator=rng)
    shared = torch.randn(LAYERS, 1, F, D, generator=rng)
    signature, loud, tiny = (torch.zeros(LAYERS, F, dtype=torch.bool) for _ in range(3))
    signature[:, :5], loud[:, 5:10], tiny[:, 10:15] = True, True, True
    deltas = torch.where(signature[:, None, :, None], deltas + shared, deltas)
    noise = 1.1 * torch.randn(LAYERS, N, F, D, generator=rng)
    deltas = torch.where(loud[:, None, :, None], noise, deltas)
    deltas = torch.where(tiny[:, None, :, None], 1e-3 * shared, deltas)
    return grams_of(deltas), signature, loud, tiny


def test_the_planted_signature_is_recalled_and_each_term_alone_is_fooled(planted):
    grams, signature, loud, tiny = planted
    scores = score_channels(grams, weight=4.0)
    ratio = float(signature.float().mean())
    assert torch.equal(select(scores.of(), ratio), signature)
    assert (select(scores.of("magnitude"), ratio) & loud).any()
    assert (select(scores.of("alignment"), ratio) & tiny).any()


def test_scores_are_the_papers_on_a_small_example():
    deltas = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[4.0, 3.0], [1.0, 0.0]], [[-3.0, -4.0], [0.0, 2.0]]])[None]
    scores = score_channels(grams_of(deltas), weight=0.01)
    assert scores.magnitude[0].tolist() == pytest.approx([5.0, 1.0])
    assert scores.alignment[0].tolist() == pytest.approx([24 / 25 / 3, 0.0])  # opposed and absent count as 0
    assert scores.of()[0, 0] == pytest.approx(5 + 0.01 * 24 / 75)


def test_a_single_variant_has_no_alignment():
    scores = score_channels(grams_of(torch.randn(1, 1, 4, 3)))
    assert torch.equal(scores.alignment, torch.zeros(1, 4))
    assert torch.equal(scores.of(), scores.magnitude)


def test_lengths_by_layer_do_not_depend_on_how_much_a_layer_moves():
    grams = grams_of(torch.randn(2, N, F, D))
    louder = grams.clone()
    louder[1] *= 100
    torch.testing.assert_close(score_channels(louder, by_layer=True).of(), score_channels(grams, by_layer=True).of())
    assert score_channels(louder).spread()["magnitude"] > score_channels(grams).spread()["magnitude"]


def test_selections_keep_their_share_scope_and_cap():
    scores = torch.rand(LAYERS, F)
    scores[0] += 10
    assert select(scores, 0.1).sum() == 12
    assert select(scores, 0.1)[0].sum() == 12
    assert select(scores, 0.3, cap=0.5).sum(1).tolist()[0] == 20
    assert select(scores, 0.3, cap=0.5).sum() == 36
    assert select(scores, 0.1, scope="per_layer").sum(1).tolist() == [4, 4, 4]
    assert select(scores, 1.0, cap=0.5).sum() == LAYERS * F // 2
    assert select(scores, 1.0, cap=1.0).all()
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="ratio and cap"):
            select(scores, wrong)


def test_random_channels_are_as_many_in_every_layer():
    mask = select(torch.rand(LAYERS, F), 0.3)
    drawn = random_like(mask, 1)
    assert torch.equal(drawn.sum(1), mask.sum(1))
    assert torch.equal(drawn, random_like(mask, 1))
    assert not torch.equal(drawn, random_like(mask, 2))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"found \(2, 3\)"):
        score_channels(torch.rand(2, 3))
