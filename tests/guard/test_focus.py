"""Focus spans: what draws attention always is not named, and what draws it beyond that is, in few tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.focus import excess, fit_focus, focus_spans

DRAWN = {0: 4.0, -1: 3.0, -2: 2.0}  # a sink in front and a template behind, as in every chat prompt


def draw_focus(rng: np.random.Generator, tokens: int, looked_at: dict[int, float] | None = None) -> np.ndarray:
    """Focus [T_p] of one prompt: everywhere a little, much at the sink and the template, and where we say."""
    focus = rng.gamma(4.0, 0.05, size=tokens)
    for place, amount in {**DRAWN, **(looked_at or {})}.items():
        focus[place] += amount
    return focus


@pytest.fixture(scope="module")
def normal():
    rng = np.random.default_rng(0)
    return fit_focus([draw_focus(rng, int(n)) for n in rng.integers(16, 90, size=200)])


def tokens_of(spans):
    return {token for span in spans for token in range(span.start, span.end)}


@pytest.mark.parametrize("tokens", [14, 30, 80])
def test_a_token_that_draws_more_than_its_place_does_is_named_first(normal, tokens):
    rng = np.random.default_rng(1)
    for place in rng.integers(2, tokens - 3, size=20):
        spans = focus_spans(draw_focus(rng, tokens, {int(place): 3.0}), normal)
        assert spans[0].start <= place < spans[0].end
        assert len(tokens_of(spans)) <= tokens / 2


def test_the_whole_phrase_is_named_though_heads_look_at_its_last_token(normal):
    spans = focus_spans(draw_focus(np.random.default_rng(2), 40, {21: 5.0}), normal)
    assert {20, 21} <= tokens_of(spans[:1])


def test_sink_and_template_are_not_named_for_drawing_what_they_always_draw(normal):
    rng = np.random.default_rng(3)
    spans = focus_spans(draw_focus(rng, 40, {17: 4.0}), normal)
    assert not tokens_of(spans) & {0, 38, 39}


def test_a_place_that_often_draws_much_is_named_after_one_that_never_does():
    rng = np.random.default_rng(6)
    fickle = [draw_focus(rng, 40, {4: float(rng.choice([0.0, 8.0]))}) for _ in range(200)]
    spans = focus_spans(draw_focus(rng, 40, {4: 8.0, 20: 3.0}), fit_focus(fickle))
    assert 20 in tokens_of(spans[:1])


def test_neighbours_are_one_span_and_distant_tokens_are_several(normal):
    rng = np.random.default_rng(4)
    near = focus_spans(draw_focus(rng, 60, {30: 4.0, 32: 4.0}), normal)
    far = focus_spans(draw_focus(rng, 60, {20: 4.0, 40: 4.0}), normal)
    assert {30, 32} <= tokens_of(near[:1])
    assert 40 not in tokens_of(far[:1]) or 20 not in tokens_of(far[:1])
    assert {20, 40} <= tokens_of(far)


def test_a_prompt_that_nobody_looked_at_has_no_spans(normal):
    assert focus_spans(np.zeros(30), normal) == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=70), st.integers(1, 5))
def test_spans_lie_in_the_prompt_apart_and_weigh_at_most_everything(values, top):
    normal = fit_focus([np.ones(30)])
    spans = focus_spans(np.asarray(values), normal, top)
    assert len(spans) <= top
    assert [s.weight for s in spans] == sorted((s.weight for s in spans), reverse=True)
    assert sum(s.weight for s in spans) <= 1.0 + 1e-9
    ordered = sorted(spans, key=lambda s: s.start)
    assert all(0 <= s.start < s.end <= len(values) for s in ordered)
    assert all(left.end <= right.start for left, right in pairwise(ordered))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 1000.0))
def test_only_shares_count_not_how_many_rows_were_summed(scale):
    normal = fit_focus([np.ones(30)])
    focus = draw_focus(np.random.default_rng(5), 30, {9: 3.0})
    assert np.allclose(excess(focus, normal), excess(scale * focus, normal))
