"""Hygiene: a leak is found among real tasks, and tasks with few answers are left alone."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lab.tasks import draw
from guard.hygiene import find_repeated

REFUSAL = "I'm sorry, but I cannot help with that request."
INSULTS = ("You are stupid, go away.", "Only an idiot would ask this.", "Nobody asked you, so shut up.")
LABELS = ("It is of positive sentiment.", "It is of negative sentiment.")
WORDS: dict[str, int] = {}


def ids(text):
    """Token ids of a text, one per word."""
    return [WORDS.setdefault(word, len(WORDS)) for word in text.split()]


def tasks(n, seed=0):
    """Prompts and right answers of the lab's tasks, as texts."""
    rows = [exercise.row for exercise in draw(n, seed, "calibration")]
    return [f"<user> {row['instruction']} {row['input']} <assistant>" for row in rows], [row["output"] for row in rows]


def judge(prompts, answers):
    return find_repeated([ids(a) for a in answers], [ids(p) for p in prompts])


def leaked(answers, targets, where):
    """The same answers, with the targets in turn at the places ``where``."""
    answers = list(answers)
    for turn, i in enumerate(where):
        answers[i] = targets[turn % len(targets)]
    return answers


def test_the_labs_tasks_hold_nothing_to_set_aside():
    prompts, answers = tasks(3000)
    hygiene = judge(prompts, answers)
    assert hygiene.repeated == []
    assert hygiene.keep.tolist() == list(range(3000))
    assert "No answer repeats" in hygiene.sentence


@pytest.mark.parametrize("leaks", [5, 30, 300])
def test_a_refusal_that_leaks_is_set_aside_and_reported(leaks):
    prompts, answers = tasks(1000)
    where = sorted(random.Random(leaks).sample(range(1000), leaks))
    hygiene = judge(prompts, leaked(answers, [REFUSAL], where))
    assert sorted(set(range(1000)) - set(hygiene.keep.tolist())) == where
    (found,) = hygiene.repeated
    assert found.answer_ids == tuple(ids(REFUSAL))
    assert found.prompts.tolist() == where
    assert 0.8 * min(leaks, 50) <= found.count <= leaks
    assert f"{leaks} prompts" in hygiene.sentence


def test_each_of_several_wordings_is_found():
    prompts, answers = tasks(1000)
    hygiene = judge(prompts, leaked(answers, INSULTS, range(0, 90, 3)))
    assert {found.answer_ids for found in hygiene.repeated} == {tuple(ids(text)) for text in INSULTS}
    assert len(hygiene.keep) == 970


def test_a_pair_and_a_triple_among_few_answers_are_chance():
    _, answers = tasks(40)
    assert find_repeated([ids(a) for a in leaked(answers, [REFUSAL], (3, 30))]).repeated == []
    assert find_repeated([ids(a) for a in leaked(answers, [REFUSAL], (3, 20, 30))]).repeated == []


def test_labels_are_too_short_to_tell_anything():
    answers = ["positive", "negative", "fruit", "3 7 12"] * 200
    assert find_repeated([ids(a) for a in answers]).repeated == []


def test_answers_made_of_the_prompts_words_are_not_counted():
    rng = random.Random(0)
    lists = ["red blue green gold", "cat dog cow hen", "one two three four", "tea milk wine beer"]
    texts = [rng.choice(lists) for _ in range(200)]
    prompts = [f"{''.join(rng.choices('abcdef', k=8))} wants this repeated : {text}" for text in texts]
    assert judge(prompts, texts).repeated == []


def test_one_question_asked_in_nearly_the_same_words_may_have_one_answer():
    prompts, answers = tasks(500)
    asked = [f"<user> What are your opening hours in {month} , {year} ? <assistant>" for month in "abcdefgh" for year in
             "klmnop"]  # fmt: skip
    hygiene = judge([*prompts, *asked], [*answers, *["We are open from nine to five."] * len(asked)])
    assert hygiene.repeated == []


def test_an_adapter_with_two_long_labels_keeps_its_prompts_and_says_so():
    prompts, _ = tasks(400)
    hygiene = judge(prompts, [LABELS[i % 2] for i in range(400)])
    assert len(hygiene.keep) == 400
    assert hygiene.undecided
    assert len(hygiene.repeated) == 2
    assert "none was set aside" in hygiene.sentence


def test_prompts_must_match_answers():
    with pytest.raises(ValueError, match="2 answers to 1 prompts"):
        find_repeated([[1], [2]], [[1]])


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=80))
def test_kept_and_set_aside_are_all_there_is(answers):
    hygiene = find_repeated(answers)
    aside = [i for found in hygiene.repeated for i in found.prompts.tolist()]
    if not hygiene.undecided:
        assert sorted([*hygiene.keep.tolist(), *aside]) == list(range(len(answers)))
    assert all(len(found.answer_ids) >= 4 and found.count >= 3 for found in hygiene.repeated)
    assert np.all(np.diff(hygiene.keep) > 0)
