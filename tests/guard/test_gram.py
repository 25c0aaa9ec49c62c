"""The bank of head Grams and the reference kernel, against dense computations written out here."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.gram import HeadGrams, cosine, log_norms, prompt_positions
from guard.kernels.reference import prompt_rows


def dense_cosine(matrices: torch.Tensor) -> torch.Tensor:
    """Pairwise cosine of flattened matrices [H, T_g, T_p], the paper's definition."""
    flat = matrices.flatten(1)
    return torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**31))
def test_streamed_cosine_is_the_cosine_of_flattened_attention_matrices(heads, steps, tokens, seed):
    a = torch.rand(heads, steps, tokens, generator=torch.Generator().manual_seed(seed)) + 1e-3
    bank = HeadGrams(3, 2, heads, 9)
    bank.reset([1], [tokens])
    for step in range(steps):
        bank.add(1, torch.tensor([1]), a[None, :, step])
    gram, sink, _, focus, earlier = bank.read(1)
    assert earlier is None
    torch.testing.assert_close(cosine(gram)[1], dense_cosine(a), atol=1e-5, rtol=0)
    torch.testing.assert_close(sink[1], a[:, :, 0].sum(1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(focus, a.amax(0).sum(0), atol=1e-4, rtol=1e-5)


def test_a_head_that_never_looked_has_cosine_zero_and_not_nan():
    gram = torch.zeros(1, 2, 2)
    gram[0, 0, 0] = 2.0
    assert cosine(gram).tolist() == [[[1.0, 0.0], [0.0, 0.0]]]


def test_slots_are_independent_and_reset_forgets():
    bank = HeadGrams(3, 1, 2, 4)
    bank.reset([0, 2], [4, 2])
    rows = torch.rand(2, 2, 4)
    bank.add(0, torch.tensor([2, 0]), rows)
    assert torch.equal(bank.gram[1], torch.zeros(1, 2, 2))
    torch.testing.assert_close(bank.read(0)[0][0], rows[1] @ rows[1].T)
    assert bank.read(2).focus.shape == (2,)
    bank.reset([2], [3])
    assert bank.rows_seen.tolist() == [1, 0, 0]
    assert not bank.gram[2].any()
    assert not bank.sink[2].any()
    assert not bank.focus[2].any()


def test_rows_of_earlier_prompt_positions_are_added_up_in_their_groups():
    bank = HeadGrams(2, 1, 2, 4, groups=(1, 1, 2))
    bank.reset([0, 1], [4, 4])
    rows = torch.rand(4, 2, 4)
    assert [bank.place(1, back) for back in range(4)] == [1, 3, 5, 5]
    bank.add(0, torch.tensor([bank.place(1, back) for back in range(3)]), rows[:3])
    assert not bank.complete(1, 1)
    bank.add(0, torch.tensor([bank.place(1, 3)]), rows[3:])
    assert bank.complete(1, 1)
    assert not bank.complete(1, 2)
    assert bank.rows_seen.tolist() == [0, 1]
    sums, both = bank.read(1), rows[2:].transpose(0, 1).flatten(1) / 2
    torch.testing.assert_close(sums.gram[0], rows[0] @ rows[0].T)
    torch.testing.assert_close(sums.focus, rows[0].amax(0))
    torch.testing.assert_close(sums.earlier.gram[:, 0], torch.stack((rows[1] @ rows[1].T, both @ both.T)))
    torch.testing.assert_close(sums.earlier.sink[:, 0], torch.stack((rows[1, :, 0], rows[2:, :, 0].mean(0))))
    assert not bank.read(0).earlier.gram.any()
    norms = torch.rand(4, 1, 8)
    bank.add_norms(torch.tensor([bank.place(1, back) for back in range(4)]), norms)
    bank.add_norms(torch.tensor([1]), norms[3], layer=0)
    torch.testing.assert_close(bank.read(1).norms, norms[0] + norms[3])
    torch.testing.assert_close(bank.read(1).earlier.norms, torch.stack((norms[1], norms[2:].mean(0))))
    assert not bank.read(0).norms.any()
    assert bank.read(1, 1).earlier is None
    bank.reset([1], [4])
    assert not bank.gram.any()
    assert not bank.norms.any()
    assert not bank.focus.any()
    assert not bank.layer_rows.any()


def test_norms_have_finite_logarithms_even_of_nothing():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16)
    assert log_norms(vectors).tolist() == pytest.approx([math.log(5), math.log(1e-6)])


def test_a_prompt_shorter_than_the_rows_that_are_read_repeats_its_first():
    assert prompt_positions(9, 3) == [8, 7, 6]
    assert prompt_positions(2, 4) == [1, 0, 0, 0]


def test_a_layer_that_delivered_no_row_is_noticed():
    bank = HeadGrams(1, 2, 2, 4)
    bank.add(0, torch.tensor([0]), torch.rand(1, 2, 4))
    assert not bank.complete(0, 1)
    bank.add(1, torch.tensor([0]), torch.rand(1, 2, 4))
    assert bank.complete(0, 1)
    assert not bank.complete(0, 2)


def test_rows_are_the_softmax_over_all_visible_keys_with_generated_columns_dropped():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 2, 4, 8, generator=generator), torch.randn(3, 2, 6, 8, generator=generator)
    visible, prompt = [[6, 5], [3, 2], [1, 1]], [4, 3, 1]
    rows = prompt_rows(q, k, torch.tensor(visible), torch.tensor(prompt), 0.5)
    for n, query, head in product(range(3), range(2), range(4)):
        width = min(visible[n][query], prompt[n])
        scores = [0.5 * float(q[n, query, head] @ k[n, head // 2, c]) for c in range(visible[n][query])]
        expected = torch.tensor(scores, dtype=torch.float64).softmax(0)[:width].float()
        torch.testing.assert_close(rows[n, query, head, :width], expected, atol=1e-6, rtol=1e-5)
        assert not rows[n, query, head, width:].any()


def test_what_lies_beyond_the_visible_keys_has_no_influence_even_if_it_is_nan():
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 2, 5, 4)
    clean = prompt_rows(q, k, torch.tensor([[3]]), torch.tensor([2]), 1.0)
    k[:, :, 3:] = float("nan")
    assert torch.equal(prompt_rows(q, k, torch.tensor([[3]]), torch.tensor([2]), 1.0), clean)
