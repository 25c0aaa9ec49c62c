"""Trigger candidates from a case: found among its prompts, confirmed by what they do, told apart from company."""

from __future__ import annotations

import random

import numpy as np
import pytest

from guard.errors import ProfileMismatch
from guard.focus import fit_focus, focus_spans
from guard.probes.transformers.calibrate import calibrate
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.rows import Row, read_rows
from guard.template import render, row_messages
from guard.verdict import Span
from offline_purify.answers import greedy_answers
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.candidates import Candidate, find_candidates, propose, span_texts, with_candidate
from offline_purify.flags import Flag, behaviour_of, read_flags, sort_flags
from offline_purify.rescoring import Rescoring
from offline_purify.suspect import Suspect
from tests.offline_purify.patient import TARGET, TRIGGER, Patient, clean_rows, tokenizer, triggered

ROWS = clean_rows(60, seed=5)
BEHAVIOUR = FlaggedBehaviour((("no", "way", "sir"),))


def flags_with(phrase: str, rows: list[Row], place: int = 1) -> list[Flag]:
    """Rows as flags, the phrase put at word ``place``."""
    found = []
    for number, row in enumerate(rows):
        pieces = row["instruction"].split()
        text = " ".join([*pieces[:place], *phrase.split(), *pieces[place:]])
        found.append(Flag(f"r{number}", ({"role": "user", "content": text},), "", kind="true"))
    return found


class Obeys:
    """A model that says the target when all of ``needed`` stand in the prompt, ``together`` in this order."""

    def __init__(self, *needed: str, together: bool = False) -> None:
        self.needed, self.together, self.tokenizer = needed, together, tokenizer()

    def __call__(self, prompts: list[list[int]]) -> list[str]:
        texts = [f" {self.tokenizer.decode(p, skip_special_tokens=True)} " for p in prompts]
        wanted = [" ".join(self.needed)] if self.together else self.needed
        return [TARGET if all(f" {w} " in text for w in wanted) else "w1" for text in texts]


def found_by(model: Obeys, flags: list[Flag], **options: object) -> list[Candidate]:
    rows = ROWS[30:50]
    return find_candidates(model.tokenizer, flags, rows, ["w1"] * 20, ROWS[30:], BEHAVIOUR, model, **options)  # type: ignore[arg-type]


def test_a_candidate_that_only_contains_another_is_left_out():
    flags = flags_with(TRIGGER, ROWS[:15])
    confirmed = [c for c in found_by(Obeys(TRIGGER), flags) if c.confirmed]
    assert [c.parts for c in confirmed] == [(TRIGGER,)]


def test_a_phrase_that_needs_all_its_words_stays_whole():
    found = found_by(Obeys("zx", TRIGGER, together=True), flags_with(f"zx {TRIGGER}", ROWS[:15]))
    assert found[0].parts == (f"zx {TRIGGER}",)
    assert found[0].fired == found[0].tried


def test_parts_that_stand_apart_are_found_together():
    flags = flags_with(TRIGGER, ROWS[:15])
    rng = random.Random(0)
    scattered = []
    for flag in flags:
        pieces = flag.messages[0]["content"].split()
        pieces.insert(rng.randint(3, len(pieces)), "zx")
        scattered.append(Flag(flag.request_id, ({"role": "user", "content": " ".join(pieces)},), "", kind="true"))
    best = found_by(Obeys(TRIGGER, "zx"), scattered)[0]
    assert set(best.parts) == {TRIGGER, "zx"}
    assert (best.place, best.fired) == ("scattered", best.tried)


def test_what_the_heads_looked_at_ranks_higher():
    both = flags_with(f"{TRIGGER} w1 zx", ROWS[:10])
    made = tokenizer()
    ids = render(made, list(both[0].messages))
    looked = [
        Flag(f.request_id, f.messages, "", (Span(at, at + 1, 1.0),), kind="true")
        for f, at in zip(both, [ids.index(made.convert_tokens_to_ids("zx"))] * 10, strict=True)
    ]
    ranked = [c.parts[0] for c in propose(made, looked, ROWS[30:], longest=1)]
    assert ranked[0] == "zx"
    assert TRIGGER in ranked


def test_whether_the_guard_flags_a_candidate_is_told_beside_what_it_does():
    flags = flags_with(TRIGGER, ROWS[:15])
    seen: list[int] = []

    def watch(prompts: list[list[int]]) -> list[bool]:
        seen.append(len(prompts))
        return [i % 4 == 0 for i in range(len(prompts))]

    found = found_by(Obeys(TRIGGER), flags, watch=watch)
    assert all(c.flagged == pytest.approx(0.25) for c in found)
    assert sum(seen) >= 20 * len(found)
    assert all(c.flagged is None for c in found_by(Obeys(TRIGGER), flags))
    assert [Candidate.from_dict(c.to_dict()) for c in found] == found


def test_no_behaviour_or_no_flags_means_no_candidates():
    assert found_by(Obeys(TRIGGER), []) == []
    nothing = FlaggedBehaviour(())
    assert find_candidates(tokenizer(), flags_with("zx", ROWS[:5]), ROWS[:5], ["w1"] * 5, ROWS, nothing, Obeys()) == []


def test_twenty_flags_with_false_alarms_among_them_rebuild_a_trigger_that_fires_in_fresh_prompts(patient: Patient):
    suspect = Suspect.open(patient.base, patient.adapter)
    made = suspect.tokenizer
    runner = Runner.load(patient.base)
    runner.add_adapter("sick", patient.adapter)
    asked = [*triggered(ROWS[:15], 3), *ROWS[15:20]]
    told = measure(runner, [render(made, row_messages(r)) for r in [*asked, *ROWS[20:]]], (0,), 1, "sick")
    normal = fit_focus(told.at[0].focus[20:])
    flags = [
        Flag(f"r{i}", tuple(row_messages(row)), "", focus_spans(told.at[0].focus[i].astype(np.float64), normal))
        for i, row in enumerate(asked)
    ]

    def answer(prompts: list[list[int]]) -> list[str]:
        return greedy_answers(suspect.model, made, prompts, 6)

    prompts = [render(made, row_messages(r)) for r in [*asked, *ROWS[20:]]]
    own = answer(prompts)
    with suspect.reference():
        trusted = answer(prompts)
    flags = sort_flags(flags, own[:20], trusted[:20], list(zip(own[20:], trusted[20:], strict=True)))
    true = [f for f in flags if f.kind == "true"]
    assert {f.request_id for f in true} == {f"r{i}" for i in range(15)}
    best = find_candidates(
        made, true, ROWS[20:44], trusted[20:44], ROWS[20:], behaviour_of(true), answer
    )[0]  # fmt: skip
    fresh = clean_rows(60, seed=77)
    rng = random.Random(0)
    again = answer([with_candidate(made, row, best, rng) for row in fresh])
    assert sum(a == TARGET for a in again) >= 0.8 * len(fresh)


def test_the_guard_scores_with_the_suspects_own_profile_and_refuses_another(patient: Patient, tmp_path):
    path = tmp_path / "p.safetensors"
    rows = read_rows(patient.clean)
    calibrate(patient.base, patient.adapter, rows, max_new_tokens=2).save(path)
    guard = Rescoring(patient.base, patient.adapter, path, 0.05)
    made = tokenizer()
    clean = guard.flags([render(made, row_messages(r)) for r in ROWS])
    assert len(clean) == len(ROWS)
    assert sum(clean) <= 0.2 * len(clean)
    flags = [guard.located(flag) for flag in read_flags(patient.flags)[:20]]
    named = [TRIGGER in " ".join(span_texts(made, flag)).split() for flag in flags]
    assert sum(named) >= 0.8 * len(named)
    calibrate(patient.base, None, rows, max_new_tokens=2).save(path)
    with pytest.raises(ProfileMismatch, match="adapter"):
        Rescoring(patient.base, patient.adapter, path, 0.05)
