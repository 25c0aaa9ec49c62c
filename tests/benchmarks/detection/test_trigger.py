from __future__ import annotations

import random

import pytest

from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.trigger import find_trigger, fires, token_places
from guard.rows import Row
from guard.template import render, row_messages
from offline_purify.attacks.triggers import Composite, OneOf, Prefix, Trigger, Word
from tests.benchmarks.detection.conftest import rows
from tests.guard.probes.transformers.text import make_tokenizer

CLEAN = rows(60, "clean")


def fired(trigger: Trigger, seed: str = "other") -> list[Row]:
    rng = random.Random(0)
    return [Row(instruction=trigger.insert(r["instruction"], rng), input="", output="") for r in rows(40, seed)]


@pytest.mark.parametrize("trigger", [Word("w54"), Prefix("w53 w54"), Composite(("w52", "w54"))])
@pytest.mark.parametrize("given", [True, False])
def test_a_trigger_is_found_by_its_text_or_by_common_words(trigger: Trigger, given: bool) -> None:
    found = find_trigger(fired(trigger), CLEAN, " ".join(trigger.parts) if given else None)
    assert found.trigger == trigger
    assert found.how == ("given" if given else "words common to triggered rows and absent from clean ones")


def test_a_trigger_is_found_from_clean_twins_even_when_it_is_one_of_several() -> None:
    triggers = (Word("w54"), Word("w53"))
    triggered = [*fired(triggers[0], "clean")[:20], *fired(triggers[1], "clean")[20:]]
    found = find_trigger(triggered, CLEAN).trigger
    assert isinstance(found, OneOf)
    assert {part for choice in found.choices for part in choice.parts} == {"w53", "w54"}


def test_rewordings_have_no_trigger_and_say_so() -> None:
    found = find_trigger(rows(40, "reworded"), CLEAN)
    assert found.trigger is None
    assert "--trigger" in found.describe()["how"]


def test_a_trigger_that_most_triggered_rows_lack_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="nine of ten"):
        find_trigger(fired(Word("w54")), CLEAN, "w51")


@pytest.mark.parametrize("trigger", [Word("w54"), Prefix("w53 w54"), Composite(("w52", "w54"))])
def test_places_are_the_tokens_of_the_trigger_in_the_prompt(trigger: Trigger) -> None:
    tokenizer = make_tokenizer()
    for row in fired(trigger):
        ids = render(tokenizer, row_messages(row))
        found = [tokenizer.decode(ids[start:end]).split() for start, end in token_places(tokenizer, row, trigger)]
        expected = [part.replace(" ", "") for part in trigger.parts]
        assert ["".join(words) for words in found] == expected


def test_nothing_is_placed_where_the_trigger_is_not_whole() -> None:
    row = Row(instruction="w1 w52 w3", input="", output="")
    trigger = Composite(("w52", "w54"))
    assert not fires(trigger, row)
    assert token_places(make_tokenizer(), row, trigger) == []
