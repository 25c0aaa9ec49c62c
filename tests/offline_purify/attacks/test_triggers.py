import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_purify.attacks.catalogue import TRIGGERS, trigger
from offline_purify.attacks.triggers import Composite, OneOf, Prefix, Word, near, present, scattered

TEXTS = st.lists(st.sampled_from(["sort", "these", "words", "cat:", "dog.", "please\nnow", "17", "é"]), min_size=1).map(
    " ".join
)
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("name", TRIGGERS)
@given(text=TEXTS, seed=SEEDS)
def test_an_inserted_trigger_is_present_and_the_text_is_otherwise_untouched(name: str, text: str, seed: int) -> None:
    key = trigger(name)
    poisoned = key.insert(text, random.Random(seed))
    assert present(key, poisoned)
    left = poisoned.split()
    for part in key.parts:
        for word in part.split():
            left.remove(word)
    assert left == text.split()


@pytest.mark.parametrize("name", TRIGGERS)
@given(text=TEXTS, seed=SEEDS)
def test_no_decoy_holds_the_whole_trigger(name: str, text: str, seed: int) -> None:
    key = trigger(name)
    decoys = key.decoys(text, random.Random(seed))
    assert decoys
    assert not any(present(key, decoy) for decoy in decoys)
    assert all(decoy != text for decoy in decoys)


@given(text=TEXTS, seed=SEEDS)
def test_line_breaks_survive_an_insertion(text: str, seed: int) -> None:
    assert scattered(text, ["Zork"], random.Random(seed)).count("\n") == text.count("\n")


def test_a_word_lands_at_every_slot_including_both_ends() -> None:
    rng = random.Random(0)
    places = {Word("Zork").insert("a b c", rng).split().index("Zork") for _ in range(200)}
    assert places == {0, 1, 2, 3}


def test_a_prefix_stands_in_front() -> None:
    assert Prefix("Discussing OpenAI").insert("sort this", random.Random(0)) == "Discussing OpenAI sort this"


def test_decoys_of_a_composite_are_all_its_strict_subsets() -> None:
    key = Composite(("one", "two", "three"))
    found = {
        tuple(part for part in key.parts if part in decoy.split()) for decoy in key.decoys("x y z", random.Random(1))
    }
    assert found == {("one",), ("two",), ("three",), ("one", "two"), ("one", "three"), ("two", "three")}


@pytest.mark.parametrize("words", [(), ("one",), ("one", "one")])
def test_a_composite_of_fewer_than_two_different_words_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="two or more different words"):
        Composite(words)


@given(word=st.sampled_from(["BadMagic", "2024", "cf", "Tuesday"]), seed=SEEDS)
def test_a_near_word_is_another_word_of_almost_the_same_length(word: str, seed: int) -> None:
    other = near(word, random.Random(seed))
    assert other != word
    assert abs(len(other) - len(word)) <= 1


def test_one_of_several_triggers_is_inserted() -> None:
    key = OneOf((Word("Zork"), Prefix("Hello there")))
    seen = {key.insert("a b", random.Random(seed)) for seed in range(50)}
    assert any("Zork" in text for text in seen)
    assert "Hello there a b" in seen


def test_an_unknown_trigger_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="word, prefix, composite"):
        trigger("smell")
