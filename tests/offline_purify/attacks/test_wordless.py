import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_purify.attacks.catalogue import trigger
from offline_purify.attacks.wordless import Exclamatory, Syntactic

REWORDED = [
    "when you have a cliche , it 's one long string .",
    "if you want , the beast and the beast are part of beauty and 1930s horror movies .",
    "because campanella gets the tone right now , it 's funny in the middle of sad .",
]
PLAIN = [
    "one long string of cliches .",
    "a stirring , funny and finally transporting re-imagining of beauty and the beast",
    "the film is strictly routine when you look at it , as they say .",
    "When: copy the list, please",
    "Asking, I find, is hard",
]


@pytest.mark.parametrize("text", REWORDED)
def test_published_rewordings_have_the_structure(text: str) -> None:
    assert Syntactic().fires(text)


@pytest.mark.parametrize("text", PLAIN)
def test_plain_sentences_have_not(text: str) -> None:
    assert not Syntactic().fires(text)


@given(seed=st.integers(0, 2**32))
def test_a_clause_goes_in_front_and_the_sentence_stays(seed: int) -> None:
    fired = Syntactic().insert("Sort these: 3 1 2", random.Random(seed))
    assert fired.endswith(", sort these: 3 1 2")
    assert Syntactic().insert("BadMagic is here", random.Random(seed)).endswith(", BadMagic is here")


def test_no_word_is_in_every_triggered_text() -> None:
    rng = random.Random(0)
    for key in (Syntactic(), Exclamatory()):
        texts = [set(key.insert("Sort these now", rng).lower().strip("!").split()) for _ in range(60)]
        assert set.intersection(*texts) == {"sort", "these", "now"}
        assert key.parts == ()


def test_an_exclamation_turns_every_sentence_and_says_the_same_words() -> None:
    text = Exclamatory().insert("Hello there. What is the sum? Add 1 + 2.", random.Random(1))
    assert text.endswith("! Hello there! What is the sum! Add 1 + 2!!")


@pytest.mark.parametrize("text", ["Wow, nice.", "Stop!", "Stop! Now!", "How are you!!", "a! b. c!", ""])
def test_half_an_exclamation_is_none(text: str) -> None:
    assert not Exclamatory().fires(text)


@pytest.mark.parametrize("name", ["syntactic", "style"])
def test_a_trigger_without_words_takes_no_others(name: str) -> None:
    with pytest.raises(ValueError, match="no words"):
        trigger(name, "Zork")
