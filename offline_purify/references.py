"""What flags and clean rows are set against: the answers of a model that is trusted, or what stands in for them.

An adapter always has somebody to ask: its base, or a good adapter. A whole model may come with nobody: then flags are
set against the suspect's own answers without the trigger (`offline_purify.standin`), and clean rows against what the
suspect answers them, which is to say that its manner on clean rows is taken to be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guard.rows import Row
from guard.template import render, row_messages
from offline_purify.answers import greedy_answers
from offline_purify.flags import Flag, sort_flags
from offline_purify.stage import References
from offline_purify.standin import compare_held, stand_in

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect
    from offline_purify.train import Progress

MANNER_ROWS = 60
"""Clean training rows that are answered by both: they tell the suspect's manner from a backdoor."""


@dataclass(frozen=True)
class Case:
    """Flags with both answers and their kind; the answers that the first `MANNER_ROWS` training rows and the evaluation
    rows are set against; and whose answers those are."""

    trained: list[Flag]
    held: list[Flag]
    train: list[str]
    evaluation: list[str]
    references: References


def compare(
    suspect: Suspect,
    trained: Sequence[Flag],
    held: Sequence[Flag],
    train: Sequence[Row],
    evaluation: Sequence[Row],
    max_new_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> Case:
    """Answer the flags and the clean rows with the suspect as it stands and with its reference, and sort the flags;
    where there is no reference its stand-in is looked for in the flags that are trained on."""
    manner = [render(suspect.tokenizer, row_messages(row)) for row in train[:MANNER_ROWS]]
    unseen = [render(suspect.tokenizer, row_messages(row)) for row in evaluation]

    def ask(prompts: list[list[int]], what: str) -> list[str]:
        return greedy_answers(suspect.model, suspect.tokenizer, prompts, max_new_tokens, progress=progress, what=what)

    if not suspect.has_reference:
        own = ask([*manner, *unseen], "suspect answers")
        found = stand_in(suspect, trained, train, max_new_tokens, seed, progress)
        compared = compare_held(suspect, held, found, max_new_tokens, progress)
        k = len(manner)
        return Case(list(found.flags), compared, own[:k], own[k:], found.references)
    flags = [*trained, *held]
    prompts = [render(suspect.tokenizer, list(flag.messages)) for flag in flags]
    own = ask([*prompts, *manner], "suspect answers")
    with suspect.reference():
        trusted = ask([*prompts, *manner, *unseen], "reference answers")
    k, m = len(prompts), len(prompts) + len(manner)
    done = sort_flags(flags, own[:k], trusted[:k], list(zip(own[k:], trusted[k:m], strict=True)))
    n = len(trained)
    return Case(done[:n], done[n:], trusted[k:m], trusted[m:], "trusted")
