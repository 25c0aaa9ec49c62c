"""Calibration hygiene: prompts that fire a backdoor must not help to define what is normal.

A backdoor that leaks into clean prompts gives the same answer to prompts that have nothing to do with each other, and
calibrating on those teaches the guard that a fired trigger is clean. With the lab's refusal, whose trigger was in a
tenth of the calibration prompts, 8 % of triggered requests were flagged at alpha 0.05; without those prompts, 76 %.
Nothing is known of the trigger, but the repetition shows. Such prompts are found, set aside and reported. An adapter
that declines a topic in the same words looks just so: whoever knows that may keep them, or has to expect more than
alpha false alarms on that topic.

Tasks may have few answers of their own, so an answer counts as repeated only when
- it has at least MIN_TOKENS tokens: labels, numbers and names are shorter;
- it is not made of the prompt's own words: copying and sorting repeat when prompts do;
- the prompts it was given to are not alike (Jaccard index of their tokens, those of the template apart);
- it recurs more often than other answers of like length do. Were answers drawn from S that are equally likely, each
  would be seen Poisson(rate) times, and the rate can be read off the answers seen once and twice (2 n2 / n1), which
  a backdoor's answer does not touch.

It finds targets that are said word for word. Varied wordings show once each has recurred; a line added to answers that
otherwise differ does not show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import poisson

MIN_TOKENS = 4
"""No answer of 4 tokens and more recurs three times among 4,000 prompts of the lab's tasks, nor at all among 14,000
rows of Alpaca, GSM8K and GPTeacher."""

_ALIKE = 0.5  # Jaccard index from which two prompts are one: paraphrases reach it, a shared phrase does not
_OWN_WORDS = 0.8  # share of an answer's distinct tokens found in the prompt from which it is made of the prompt
_CHANCE = 1e-3  # expected number of innocent answers that are set aside, per calibration
_LIKE_LENGTH = 1.5  # answers up to this many times as long or short tell how often one of this length recurs
_FEW = 10.0  # imaginary answers seen once: with hardly any real ones, four recurrences are odd and three are not
_MOST = 0.5  # a backdoor that answers more prompts than this is the adapter's task as far as anyone can tell
_REPRESENTATIVES = 50  # unlike prompts that are enough to make any answer odd


@dataclass(frozen=True)
class Repeated:
    """One answer that was given to ``count`` prompts that are not alike: its token ids, and which prompts (int [m],
    m >= count: paraphrases are set aside with the prompts they are like)."""

    count: int
    answer_ids: tuple[int, ...]
    prompts: np.ndarray


@dataclass(frozen=True)
class Hygiene:
    """Which prompts are fit for calibration (``keep``, int, ascending) and the answers that spoke against the others.

    ``undecided``: so many answers repeat that repetition says nothing; then everything is kept, and reported."""

    keep: np.ndarray
    repeated: list[Repeated]
    undecided: bool = False

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        if not self.repeated:
            return "No answer repeats beyond what prompts and chance explain."
        prompts = sum(len(r.prompts) for r in self.repeated)
        found = f"{prompts} prompts got one of {len(self.repeated)} answers that repeat word for word"
        if self.undecided:
            return f"{found}, too many to tell a task from a backdoor: none was set aside."
        return f"{found} although the prompts are not alike: they were set aside."


def find_repeated(answers: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]] | None = None) -> Hygiene:
    """Judge n answers (token ids each, without end-of-sequence), and the prompts (token ids) they were given to.

    Without ``prompts`` the answers are judged by themselves. An answer that was cut off is judged by what there is.
    Raises ValueError when there are not as many prompts as answers.
    """
    if prompts is not None and len(prompts) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(prompts)} prompts.")
    bags = _bags(prompts) if prompts is not None else None
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, answer in enumerate(answers):
        if len(answer) >= MIN_TOKENS and (prompts is None or not _of_own_words(answer, prompts[i])):
            groups.setdefault(tuple(answer), []).append(i)
    counts = {answer: len(members) if bags is None else _unlike(members, bags) for answer, members in groups.items()}
    repeated = [
        Repeated(counts[answer], answer, np.asarray(members, dtype=np.int64))
        for answer, members in groups.items()
        if counts[answer] > 2 and _is_odd(answer, counts)
    ]
    repeated.sort(key=lambda r: (-r.count, r.answer_ids))
    aside = np.concatenate([r.prompts for r in repeated]) if repeated else np.zeros(0, dtype=np.int64)
    everything = np.arange(len(answers), dtype=np.int64)
    if len(aside) > _MOST * len(answers):
        return Hygiene(everything, repeated, undecided=True)
    return Hygiene(np.setdiff1d(everything, aside), repeated)


def _bags(prompts: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """The distinct tokens of each prompt, without those that more than half of the prompts have (the template)."""
    bags = [frozenset(prompt) for prompt in prompts]
    common = {token for token, n in Counter(t for bag in bags for t in bag).items() if n > 0.5 * len(bags)}
    return [bag - common for bag in bags]


def _of_own_words(answer: Sequence[int], prompt: Sequence[int]) -> bool:
    said = set(answer)
    return len(said & set(prompt)) >= _OWN_WORDS * len(said)


def _unlike(members: Sequence[int], bags: Sequence[frozenset[int]]) -> int:
    """How many of the prompts ``members`` are unlike each of those counted before them (at most _REPRESENTATIVES)."""
    seen: list[frozenset[int]] = []
    for i in members:
        if len(seen) == _REPRESENTATIVES:
            break
        if all(len(bags[i] & other) < _ALIKE * len(bags[i] | other) for other in seen):
            seen.append(bags[i])
    return len(seen)


def _is_odd(answer: tuple[int, ...], counts: dict[tuple[int, ...], int]) -> bool:
    """Whether an answer recurs more often than any innocent one of like length would."""
    like = [
        n
        for other, n in counts.items()
        if other != answer and len(answer) / _LIKE_LENGTH <= len(other) <= len(answer) * _LIKE_LENGTH
    ]
    rate = 2.0 * (like.count(2) + 0.5) / (like.count(1) + _FEW)
    seen_so_often = poisson.sf(counts[answer] - 1, rate) / -np.expm1(-rate)
    return bool(seen_so_often * (len(like) + _FEW) <= _CHANCE)
