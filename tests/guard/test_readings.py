"""Readings at a checkpoint beside the same requests' at step 0: features of what was generated, and of what was not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from guard.features import Heads
from guard.gram import PROMPT_GROUPS, cosine
from guard.readings import Readings
from tests.guard.conftest import HEADS, KV_HEADS, LAYERS, NORMS, draw_measurement, draw_norms, draw_request, draw_rows

PAIRS = HEADS * (HEADS - 1) // 2
WIDTH = LAYERS * sum(Heads(HEADS, KV_HEADS).families)


@pytest.fixture(scope="module")
def drawn():
    return draw_measurement(np.random.default_rng(3), 30)


def test_every_checkpoint_knows_the_opening_of_its_requests(drawn):
    for step in drawn.at:
        readings = drawn.reached(step)
        assert readings.index.tolist() == drawn.at[step].index.tolist()
        assert torch.equal(readings.opening.gram, drawn.at[0].gram[torch.from_numpy(readings.index)])
        assert readings.opening.step == 0
    assert drawn.reached(2) is drawn.reached(2)
    alone = drawn.reached(2).take(np.asarray([1]))
    assert torch.equal(alone.opening.gram[0], drawn.at[0].gram[drawn.at[2].index[1]])


def test_features_of_generated_rows_are_those_of_their_own_gram():
    rng = np.random.default_rng(4)
    before, after = draw_rows(rng, 50), [draw_rows(rng, 50) for _ in range(2)]
    prompt = [np.zeros(50)]
    norms = [draw_norms(rng) for _ in range(3)]
    first = Readings(
        0, np.zeros(1, int), (before @ before.mT)[None], before[None, ..., 0], norms[0][None], np.zeros((1, 1)), prompt
    )
    gram = sum(((rows @ rows.mT) for rows in after), before @ before.mT)
    sink = before[..., 0] + after[0][..., 0] + after[1][..., 0]
    later = Readings(2, np.zeros(1, int), gram[None], sink[None], sum(norms)[None], np.zeros((1, 3)), prompt, first)
    assert later.features.shape == (1, 2 * WIDTH + 1)
    np.testing.assert_array_equal(later.features[:, :WIDTH], first.features[:, :WIDTH])
    assert later.features[0, -1] == first.features[0, -1] == np.log(50)
    flat = torch.cat(after, dim=-1)
    upper = torch.triu_indices(HEADS, HEADS, offset=1)
    expected = torch.arctanh(cosine(flat @ flat.mT)[:, upper[0], upper[1]])
    found = later.features[0, WIDTH:-1].reshape(LAYERS, -1)
    np.testing.assert_allclose(found[:, :PAIRS], expected, atol=2e-3)
    np.testing.assert_allclose(found[:, -NORMS:], (norms[1] + norms[2]) / 2, atol=1e-6)


def test_a_request_that_was_not_read_at_the_opening_is_left_out_later(drawn):
    missed = replace(drawn, at={**drawn.at, 0: drawn.at[0].take(np.arange(1, 30))})
    assert 0 not in missed.reached(1).index
    assert len(missed.reached(1).index) == len(drawn.at[1].index) - 1


def test_features_beyond_the_opening_cannot_be_had_without_it():
    _, readings = draw_request(np.random.default_rng(5))
    with pytest.raises(ValueError, match="step 0"):
        _ = Readings.single(readings[1]).features
    assert Readings.single(readings[1], Readings.single(readings[0])).features.shape == (
        1,
        (len(PROMPT_GROUPS) + 1) * WIDTH + 1,
    )


def test_rows_of_earlier_prompt_positions_have_features_of_their_own(drawn):
    opening = drawn.at[0].take(np.asarray([4, 2]))
    assert opening.features.shape == (2, len(PROMPT_GROUPS) * WIDTH + 1)
    for back in range(1, len(PROMPT_GROUPS)):
        gram, sink, norms = (part[:, back - 1] for part in opening.earlier)
        alone = Readings(0, opening.index, gram, sink, norms, opening.logprobs, opening.focus)
        np.testing.assert_array_equal(opening.features[:, back * WIDTH :][:, :WIDTH], alone.features[:, :WIDTH])
    one = Readings.single(opening.reading(1))
    np.testing.assert_array_equal(one.features[0], opening.features[1])
