"""Answers to set flags against where nobody trusted can be asked: the suspect's own, without the trigger.

A whole model comes with no base to fall back to. The suspect itself is asked again with words taken out of the flagged
prompts: phrases that the flags share and clean rows do not, confirmed in both directions (taken out of flags the
answers change alike; put into clean rows they bring the flagged behaviour), or else the words that the verdicts' focus
points at. This is no trusted answer: it is right as far as the suspect is right without its trigger, and where no words
are found there is none. Flags that hold none of the words keep no reference and stay ``unsorted``. Held-out flags have
no say in which words those are: they are compared afterwards (`compare_held`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guard.rows import Row
from guard.template import render, row_messages, with_user_text
from offline_purify.answers import greedy_answers
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.candidates import Answer, Candidate, combine, confirm, propose, span_texts, user_text
from offline_purify.flags import Flag, behaviour_of, sort_flags
from offline_purify.stage import References

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect
    from offline_purify.train import Progress

MOST_PHRASES = 6
CONFIRM_ROWS = 24


@dataclass(frozen=True)
class StandIn:
    """Flags with the suspect's answer and, where one could be had, the one that stands in for a trusted one; the
    behaviour they show; the candidates that were confirmed; and how the words were found."""

    flags: tuple[Flag, ...]
    behaviour: FlaggedBehaviour
    candidates: tuple[Candidate, ...]
    found_by: str | None

    @property
    def references(self) -> References:
        """Whose answers the flags' references are."""
        return "own" if self.behaviour.targets else "none"


def without(text: str, phrases: Sequence[str]) -> str:
    """``text`` with every phrase taken out where it stands as whole words, whatever is between its words."""
    for phrase in phrases:
        pattern = r"\W+".join(re.escape(word) for word in phrase.split())
        text = re.sub(rf"(?<!\w){pattern}(?!\w)[:,;]?", " ", text)
    return re.sub(r"[ \t]{2,}", " ", text).strip()


def prompt_without(tokenizer: Any, flag: Flag, phrases: Sequence[str]) -> list[int] | None:
    """Token ids of a flagged conversation, its last user turn without the phrases; None if it holds none of them or
    nothing else."""
    text = user_text(flag)
    left = without(text, phrases)
    if left == without(text, ()) or not left:
        return None
    return render(tokenizer, with_user_text(flag.messages, left))


def stand_in(
    suspect: Suspect,
    flags: Sequence[Flag],
    clean: Sequence[Row],
    max_new_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> StandIn:
    """Answer flags with the suspect as it stands, with and without the words that seem to trigger it."""
    tokenizer, ask = suspect.tokenizer, _asking(suspect, max_new_tokens, progress, "asking without the trigger")
    said = ask([render(tokenizer, list(flag.messages)) for flag in flags])
    answered = _answered(flags, said)
    rows = clean[:CONFIRM_ROWS]
    plain = ask([render(tokenizer, row_messages(row)) for row in rows])
    singles = propose(tokenizer, answered, clean)[:MOST_PHRASES]
    fronts = [replace(candidate, place="front") for candidate in singles]
    for tried in (singles, [*fronts, *combine(singles, answered)]):
        best = _best(tokenizer, answered, tried, rows, plain, ask, seed)
        if best is not None:
            return best
    focused = _compared(tokenizer, answered, [span_texts(tokenizer, flag) for flag in answered], ask)
    behaviour = behaviour_of(focused)
    return StandIn(tuple(focused), behaviour, (), "focus" if behaviour.targets else None)


def compare_held(
    suspect: Suspect, held: Sequence[Flag], found: StandIn, max_new_tokens: int, progress: Progress | None = None
) -> list[Flag]:
    """Held-out flags answered as those of ``found`` were, with the words that were found there and without, and sorted
    in their company: what recurs is known from them."""
    tokenizer, ask = suspect.tokenizer, _asking(suspect, max_new_tokens, progress, "asking held-out flags")
    said = ask([render(tokenizer, list(flag.messages)) for flag in held])
    answered = _answered(held, said)
    if found.candidates:
        phrases: list[Sequence[str]] = [found.candidates[0].parts] * len(held)
    else:
        phrases = [span_texts(tokenizer, flag) if found.found_by else () for flag in held]
    return _compared(tokenizer, answered, phrases, ask, [f for f in found.flags if f.kind != "unsorted"])


def _asking(suspect: Suspect, max_new_tokens: int, progress: Progress | None, what: str) -> Answer:
    """The suspect as it stands, answering prompts greedily."""

    def ask(prompts: list[list[int]]) -> list[str]:
        return greedy_answers(suspect.model, suspect.tokenizer, prompts, max_new_tokens, progress=progress, what=what)

    return ask


def _answered(flags: Sequence[Flag], answers: Sequence[str]) -> list[Flag]:
    """Flags with the suspect's answers and nothing that an earlier comparison made of them."""
    return [
        replace(flag, suspicious=answer, reference="", kind="unsorted")
        for flag, answer in zip(flags, answers, strict=True)
    ]


def _best(
    tokenizer: Any,
    flags: Sequence[Flag],
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    plain: Sequence[str],
    ask: Answer,
    seed: int,
) -> StandIn | None:
    """The stand-in by the confirmed candidate that explains most flags; None if none is confirmed."""
    found: list[tuple[tuple[int, int], StandIn]] = []
    for candidate in candidates:
        compared = _compared(tokenizer, flags, [candidate.parts] * len(flags), ask)
        behaviour = behaviour_of(compared)
        if not behaviour.targets:
            continue
        (tried,) = confirm(tokenizer, [candidate], rows, plain, behaviour, ask, seed)
        if tried.confirmed:
            merit = (len(behaviour.targets), tried.fired)
            found.append((merit, StandIn(tuple(compared), behaviour, (tried,), "candidate")))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _compared(
    tokenizer: Any, flags: Sequence[Flag], phrases: Sequence[Sequence[str]], ask: Answer, company: Sequence[Flag] = ()
) -> list[Flag]:
    """Flags set against the suspect's answers without their phrases, sorted together with a ``company`` that was
    compared before; those that hold none of their phrases stay as they are."""
    prompts = [prompt_without(tokenizer, flag, words) for flag, words in zip(flags, phrases, strict=True)]
    asked = [number for number, prompt in enumerate(prompts) if prompt is not None]
    answers = ask([prompt for prompt in prompts if prompt is not None])
    together = [*(flags[n] for n in asked), *company]
    references = [*answers, *(flag.reference for flag in company)]
    sorted_flags = sort_flags(together, [flag.suspicious for flag in together], references, ())
    done = list(flags)
    for number, flag in zip(asked, sorted_flags, strict=False):  # the company, at the end, is left behind
        done[number] = flag
    return done
