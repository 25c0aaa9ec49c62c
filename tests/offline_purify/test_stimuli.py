"""Stimuli are foreign to the clean prompts, cover a small vocabulary whole, and stand where they should."""

import random

import pytest

from guard.rows import Row
from offline_purify.stimuli import BUNDLE, KINDS, Stimulus, draw_stimuli, vocabulary_words
from tests.offline_purify.patient import TRIGGER, clean_rows, tokenizer


@pytest.fixture(scope="module")
def made():
    return tokenizer()


ROWS = clean_rows(40, seed=0)


def test_words_come_from_the_vocabulary_and_from_no_clean_prompt(made):
    found = vocabulary_words(made, [Row(instruction="repeat no w1", input="", output="")])
    assert {TRIGGER, "way", "sir", "w2"} <= set(found)
    assert not {"repeat", "no", "w1"} & set(found)
    assert not [word for word in found if word in made.all_special_tokens]


def test_bundles_take_the_whole_vocabulary_where_there_are_enough_of_them(made):
    rows = ROWS[:2]
    words = vocabulary_words(made, rows)
    drawn = draw_stimuli(made, rows, per_kind=len(words), seed=0)
    bundled = [word for s in drawn if s.kind == "bundle" for word in s.parts]
    assert sorted(bundled) == sorted(words)
    assert all(len(s.parts) <= BUNDLE for s in drawn)
    assert drawn.covered == drawn.vocabulary == len(words)


def test_every_kind_is_there_and_the_same_seed_draws_the_same(made):
    drawn = draw_stimuli(made, ROWS[:2], 3, seed=1, given=["Open sesame", " ", "Open sesame"])
    assert {s.kind for s in drawn} == set(KINDS)
    assert [s.parts for s in drawn if s.kind == "given"] == [("Open sesame",)] * 2
    assert drawn.all == draw_stimuli(made, ROWS[:2], 3, seed=1, given=["Open sesame"]).all
    assert drawn.all != draw_stimuli(made, ROWS[:2], 3, seed=2, given=["Open sesame"]).all


def test_made_up_words_stand_in_no_prompt(made):
    asked = " ".join(row["instruction"] for row in ROWS)
    drawn = draw_stimuli(made, ROWS, 20, seed=0)
    assert not [s for s in drawn if s.kind == "made-up" and s.parts[0] in asked.split()]


@pytest.mark.parametrize(("place", "first"), [("front", True), ("scattered", False)])
def test_a_stimulus_stands_in_front_or_among_the_words(made, place, first):
    row = Row(instruction="repeat w1 w2 w3", input="", output="w3")
    ids = Stimulus("pair", (TRIGGER, "way"), place).prompt(made, row, random.Random(3))
    text = made.decode(ids, skip_special_tokens=True).split()
    assert sorted(text) == sorted(["repeat", "w1", "w2", "w3", TRIGGER, "way"])
    assert (text[0] != "repeat") or not first
