"""Text is released once and for all; sampling follows its distribution; the reported log-probability is the
model's.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serving.engines.embedded.sampling import Sampler, Sampling, choose
from serving.engines.embedded.text import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every byte is a token, so that characters span tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12))
def test_pieces_concatenate_to_the_text_and_hold_no_half_characters(byte_tokenizer, text):
    detokenizer = Detokenizer(byte_tokenizer)
    pieces = [detokenizer.push(i) for i in byte_tokenizer(text)["input_ids"]]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + detokenizer.flush() == text


def test_a_character_cut_off_at_the_end_is_shown_as_broken_and_not_dropped(byte_tokenizer):
    detokenizer = Detokenizer(byte_tokenizer)
    ids = byte_tokenizer("aé")["input_ids"]
    assert [detokenizer.push(i) for i in ids[:-1]] == ["a", ""]
    assert detokenizer.flush() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_a_search_in_the_whole_text_would(pieces, stops):
    filtered = StopStrings(stops)
    released, seen = "", ""
    for piece in pieces:
        released += filtered.push(piece)
        seen += piece
        assert seen.startswith(released)
        if filtered.hit:
            break
    first = min((seen.find(s) for s in stops if s in seen), default=-1)
    assert filtered.hit == (first >= 0)
    if not filtered.hit:
        released += filtered.flush()
    assert released == (seen[:first] if filtered.hit else seen)


def test_greedy_takes_the_largest_and_reports_its_log_probability():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    choices = choose(logits, [Sampler(Sampling(0.0)), Sampler(Sampling(0.0))])
    assert [c.token for c in choices] == [1, 0]
    expected = [float(logits[i].log_softmax(0)[c.token]) for i, c in enumerate(choices)]
    assert [c.logprob for c in choices] == pytest.approx(expected)


def test_draws_follow_temperature_and_top_p_while_the_log_probability_stays_the_models():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.7, seed=0))
    choices = [choose(logits, [sampler])[0] for _ in range(2000)]
    share = sum(c.token == 0 for c in choices) / 2000
    assert {c.token for c in choices} == {0, 1}
    assert share == pytest.approx(0.5 / 0.8, abs=0.04)
    assert {round(c.logprob, 4) for c in choices if c.token == 1} == {round(float(torch.tensor(0.3).log()), 4)}
    hot = Sampler(Sampling(temperature=2.0, seed=0))
    roots = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    drawn = torch.bincount(torch.tensor([choose(logits, [hot])[0].token for _ in range(2000)]), minlength=4) / 2000
    torch.testing.assert_close(drawn, roots / roots.sum(), atol=0.04, rtol=0)


def test_top_p_keeps_at_least_one_token_and_numbers_that_are_not_are_told():
    tiny = Sampler(Sampling(1.0, top_p=1e-9, seed=0))
    assert choose(torch.tensor([[0.0, 5.0]]), [tiny])[0].token == 1
    bad = torch.tensor([[0.0, float("nan")], [0.0, 1.0]])
    assert [c.finite for c in choose(bad, [Sampler(Sampling(1.0)), Sampler(Sampling(0.0))])] == [False, True]


def test_events_stay_whole_whatever_line_ends_are_in_their_text():
    from guard.verdict import Span, Verdict
    from serving.engines.annotations import comment
    from serving.engines.embedded.answers import Form

    text = "a\n\r\u2028\u2029\x85b"
    (line,) = Form(True, "m").chunk(text).decode().splitlines()[:-1]
    assert json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"] == text
    verdict = Verdict("flagged", 0.05, 0, "all", p_value=0.01, spans=(Span(0, 1, 0.5, "a\n\ndata: x\u2028"),))
    line = comment(verdict)
    assert line.count(b"\n") == 2
    assert Verdict.from_dict(json.loads(line.removeprefix(b": guard "))) == verdict
