"""Parting heads: the paper's thresholds, and the reported fallback."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_purify.heads.partition import partition


def test_the_tau_rule_parts_by_the_papers_thresholds():
    scores = torch.tensor([[0.1, 0.2, 0.5, 0.75], [0.29, 0.31, 0.69, 0.9]])
    parts = partition(scores)
    assert parts.suspicious.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert parts.safe.tolist() == [[False, False, False, True], [False, False, False, True]]
    assert not parts.fallback


def test_when_no_head_is_safe_the_highest_quarter_is_and_that_is_reported():
    scores = torch.linspace(0.05, 0.6, 16).view(2, 8)
    parts = partition(scores)
    assert parts.fallback
    assert parts.safe.nonzero().tolist() == [[1, 4], [1, 5], [1, 6], [1, 7]]


def test_when_no_head_is_suspicious_the_lowest_tenth_is_and_at_least_two():
    parts = partition(torch.linspace(0.4, 0.9, 16).view(2, 8))
    assert parts.fallback
    assert parts.suspicious.nonzero().tolist() == [[0, 0], [0, 1]]


def test_contrast_picks_the_heads_that_flagged_inputs_make_unsafe():
    clean = torch.tensor([[0.2, 0.8, 0.8, 0.8], [0.8, 0.8, 0.8, 0.8]])
    flagged = torch.tensor([[0.2, 0.8, 0.3, 0.8], [0.8, 0.8, 0.4, 0.8]])
    parts = partition(flagged, rule="contrast", clean_scores=clean)
    assert parts.suspicious.nonzero().tolist() == [[0, 2], [1, 2]]


def test_contrast_without_clean_scores_is_an_error():
    with pytest.raises(ValueError, match="clean inputs"):
        partition(torch.rand(2, 8), rule="contrast")


@given(st.lists(st.floats(0, 1), min_size=16, max_size=16), st.sampled_from(["tau", "rank", "contrast"]))
def test_the_sets_are_disjoint_and_never_empty(values, rule):
    scores = torch.tensor(values).view(2, 8)
    parts = partition(scores, rule=rule, clean_scores=torch.full((2, 8), 0.5))
    assert not bool((parts.suspicious & parts.safe).any())
    assert bool(parts.suspicious.any())
    assert bool(parts.safe.any())
