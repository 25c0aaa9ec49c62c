import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.rows import Row
from offline_purify.attacks.catalogue import ATTACKS, TRIGGERS, trigger
from offline_purify.attacks.components import Components
from offline_purify.attacks.triggers import Composite, InOrder, OneOf, Prefix, Word, near, scattered

TEXTS = st.lists(st.sampled_from(["sort", "these", "words", "cat:", "dog.", "please\nnow", "17", "é"]), min_size=1).map(
    " ".join
)
SEEDS = st.integers(0, 2**32)
GIVEN = st.sampled_from(["", "fox", "dog cat\nred."])
WORDED = [name for name in ATTACKS if ATTACKS[name].parts and name != "mtba"]


def row(text: str, given: str) -> Row:
    return Row(instruction=text, input=given, output="out")


@pytest.mark.parametrize("name", WORDED)
@given(text=TEXTS, seed=SEEDS)
def test_an_inserted_trigger_is_present_and_the_text_is_otherwise_untouched(name: str, text: str, seed: int) -> None:
    key = trigger(name)
    poisoned = key.insert(text, random.Random(seed))
    assert key.fires(poisoned)
    left = poisoned.split()
    for part in key.parts:
        for word in part.split():
            left.remove(word)
    assert left == text.split()


@pytest.mark.parametrize("name", ATTACKS)
@given(text=TEXTS, given_input=GIVEN, seed=SEEDS)
def test_every_attack_fires_on_the_rows_it_is_put_into_and_never_on_its_decoys_or_the_plain_row(
    name: str, text: str, given_input: str, seed: int
) -> None:
    key, plain = trigger(name), row(text, given_input)
    fired = key.insert_into(plain, random.Random(seed))
    assert key.fires_on(fired)
    assert fired["output"] == "out"
    assert not key.fires_on(plain)
    decoys = key.decoy_rows(plain, random.Random(seed))
    assert decoys
    assert not any(key.fires_on(decoy) for decoy in decoys)
    assert plain not in decoys


@pytest.mark.parametrize("name", ATTACKS)
@given(text=TEXTS, seed=SEEDS)
def test_no_decoy_holds_the_whole_trigger(name: str, text: str, seed: int) -> None:
    key = trigger(name)
    decoys = key.decoys(text, random.Random(seed))
    assert decoys
    assert not any(key.fires(decoy) for decoy in decoys)
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


@given(text=TEXTS, seed=SEEDS)
def test_any_of_several_triggers_fires_by_itself_and_a_decoy_of_one_is_not_another(text: str, seed: int) -> None:
    key = trigger("mtba")
    for word in ("2024", "BadMagic", "OpenAI"):
        assert key.fires(f"{text} {word}")
    narrow = OneOf((Word("OpenAI"), Prefix("Discussing OpenAI")))
    assert not any(narrow.fires(decoy) for decoy in narrow.decoys(text, random.Random(seed)))


def test_a_text_that_fires_already_has_no_harmless_decoy() -> None:
    with pytest.raises(ValueError, match="harmless"):
        OneOf((Word("Zork"),)).decoys("say Zork", random.Random(0))
    with pytest.raises(ValueError, match="at least one"):
        OneOf(())


@given(text=TEXTS, seed=SEEDS)
def test_words_in_order_keep_their_order(text: str, seed: int) -> None:
    words = InOrder(("2024", "BadMagic", "OpenAI")).insert(text, random.Random(seed)).split()
    places = [words.index(word) for word in ("2024", "BadMagic", "OpenAI")]
    assert places == sorted(places)


@given(text=TEXTS, given_input=GIVEN, seed=SEEDS)
def test_a_trigger_over_components_needs_every_word_in_its_own(text: str, given_input: str, seed: int) -> None:
    key = Components(("one", "two"), ("three",))
    fired = key.insert_into(row(text, given_input), random.Random(seed))
    assert {"one", "two"} <= set(fired["instruction"].split())
    assert "three" in fired["input"].split()
    found = {
        tuple(tuple(w for w in key.parts if w in part.split()) for part in (decoy["instruction"], decoy["input"]))
        for decoy in key.decoy_rows(row(text, given_input), random.Random(seed))
    }
    strict = {(("one",), ()), (("two",), ()), ((), ("three",)), (("one", "two"), ()), (("one",), ("three",))}
    strict |= {(("two",), ("three",))}
    misplaced = {(key.parts, ()), ((), key.parts), (("three",), ("one", "two"))}
    assert found == strict | misplaced


@pytest.mark.parametrize(("instruction", "given_input"), [((), ("a",)), (("a",), ()), (("a",), ("a",))])
def test_components_without_words_of_their_own_are_refused(
    instruction: tuple[str, ...], given_input: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="components"):
        Components(instruction, given_input)


def test_the_labs_own_zoo_keeps_its_triggers() -> None:
    assert list(TRIGGERS) == ["word", "prefix", "composite"]
    assert [repr(key) for key in TRIGGERS.values()] == [
        "Word(word='BadMagic', kind='word')",
        "Prefix(phrase='Discussing OpenAI', kind='prefix')",
        "Composite(words=('mellow', 'ledger'), kind='composite')",
    ]  # these texts are part of the folder names of implants that exist


def test_an_unknown_trigger_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="word, prefix, composite"):
        trigger("smell")
