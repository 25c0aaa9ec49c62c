"""Guessing the trigger from the case: words the flags share and the heads look at, confirmed by re-insertion.

Proposals are word sequences inside the spans of the flags (widened to whole words) and word sequences that
recur across flagged prompts; both are ranked by how many flags hold them beyond clean rows. A proposal counts only if
it *works*: inserted into clean prompts that never saw it, it makes the suspicious model show the flagged behaviour.
The true trigger is never looked at. Single phrases at a random place or at the front, and pairs scattered over the
prompt, are tried; context and paraphrase triggers are not found this way.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from guard.rows import Row
from guard.template import Message, last_user_turn, render, row_messages
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.flags import Flag

Place = Literal["anywhere", "front", "scattered"]
CONFIRMED = 0.5
"""Share of clean prompts on which an inserted candidate must fire to be confirmed."""
_AS_WELL = 0.8  # of a few dozen prompts: what a shorter candidate may lose against a longer one by chance


def inserted(text: str, parts: Sequence[str], place: Place, rng: random.Random) -> str:
    """``text`` with every part put in, each between two words (or all of them in front, in their order)."""
    if place == "front":
        return " ".join([*parts, text])
    pieces = text.split(" ")
    for part in parts:
        pieces.insert(rng.randint(0, len(pieces)), part)
    return " ".join(pieces)


@dataclass(frozen=True)
class Candidate:
    """Parts to insert (one phrase, or several that must all be present), where, and how well that worked.

    ``flags`` is the share of flags that hold all parts, ``clean`` the share of clean rows; ``fired`` of ``tried``.
    ``flagged`` is the share of those ``tried`` that the guard flags; None where no profile was at hand.
    """

    parts: tuple[str, ...]
    place: Place
    flags: float
    clean: float
    fired: int = 0
    tried: int = 0
    flagged: float | None = None

    @property
    def confirmed(self) -> bool:
        """Whether re-insertion fired often enough."""
        return self.tried > 0 and self.fired / self.tried >= CONFIRMED

    def insert(self, text: str, rng: random.Random) -> str:
        """``text`` with every part put in, each between two words."""
        return inserted(text, self.parts, self.place, rng)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; ``from_dict`` gives it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Candidate:
        """The candidate that ``to_dict`` wrote."""
        return cls(**{**data, "parts": tuple(data["parts"])})


def user_text(flag: Flag) -> str:
    """What the user wrote last in a flagged conversation."""
    return flag.messages[last_user_turn(flag.messages)]["content"]


def _pieces(text: str) -> list[str]:
    return [w for w in (re.sub(r"^[^\w]+|[^\w]+$", "", p) for p in text.split()) if w]


def _grams(pieces: Sequence[str], longest: int) -> set[tuple[str, ...]]:
    return {tuple(pieces[i : i + n]) for n in range(1, longest + 1) for i in range(len(pieces) - n + 1)}


def span_texts(tokenizer: Any, flag: Flag) -> list[str]:
    """Texts of a flag's spans, widened to whole words; spans are token ranges of the rendered prompt."""
    ids = render(tokenizer, list(flag.messages), add_generation_prompt=True)
    found = []
    for span in flag.spans:
        if not 0 <= span.start < span.end <= len(ids):
            continue
        start = len(tokenizer.decode(ids[: span.start]))
        end = len(tokenizer.decode(ids[: span.end]))
        whole = tokenizer.decode(ids)
        while start > 0 and not whole[start - 1].isspace() and not whole[start : start + 1].isspace():
            start -= 1
        while end < len(whole) and not whole[end].isspace():
            end += 1
        found.append(whole[start:end])
    return found


def propose(
    tokenizer: Any, flags: Sequence[Flag], clean: Sequence[Row], most: int = 12, longest: int = 4
) -> list[Candidate]:
    """Phrases (1 to ``longest`` words) ranked by flag share minus clean share, spans counting half as much again.

    A phrase that is part of a longer one with the same share gives way to it.
    """
    if not flags:
        return []
    seen = Counter(g for f in flags for g in _grams(_pieces(user_text(f)), longest))
    spanned: Counter[tuple[str, ...]] = Counter()
    for flag in flags:
        own = _grams(_pieces(user_text(flag)), longest)
        in_spans = {g for text in span_texts(tokenizer, flag) for g in _grams(_pieces(text), longest)}
        spanned.update(own & in_spans)
    in_clean = Counter(g for row in clean for g in _grams(_pieces(row_messages(row)[0]["content"]), longest))
    shares: dict[tuple[str, ...], tuple[float, float, float]] = {}
    for gram, n in seen.items():
        if n < min(2, len(flags)):
            continue
        in_flags, in_rows = n / len(flags), in_clean[gram] / max(len(clean), 1)
        if in_flags > 2 * in_rows + 0.05:
            shares[gram] = (in_flags - in_rows + 0.5 * spanned[gram] / len(flags), in_flags, in_rows)
    kept = [
        g
        for g in shares
        if not any(
            len(o) > len(g) and shares[o][1] >= shares[g][1] and any(o[i : i + len(g)] == g for i in range(len(o)))
            for o in shares
        )
    ]
    kept.sort(key=lambda g: (-shares[g][0], g))
    return [Candidate((" ".join(g),), "anywhere", shares[g][1], shares[g][2]) for g in kept[:most]]


def combine(singles: Sequence[Candidate], flags: Sequence[Flag], most: int = 6) -> list[Candidate]:
    """Sets of two and three proposals that occur together in at least half of the flags: triggers that need all
    parts."""
    texts = [" ".join(_pieces(user_text(f))) for f in flags]
    names = [c.parts[0] for c in singles[:6]]
    groups = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    groups_three = [(*g, c) for g in groups for c in names[names.index(g[1]) + 1 :]]
    found = []
    for group in [*groups_three, *groups]:
        together = sum(all(part in text for part in group) for text in texts) / max(len(texts), 1)
        if together >= 0.5:
            found.append(Candidate(tuple(group), "scattered", together, 0.0))
    return sorted(found, key=lambda c: -c.flags)[:most]


Answer = Callable[[list[list[int]]], list[str]]
"""Greedy answers of the suspicious model to prompts of token ids."""
Watch = Callable[[Sequence[Sequence[int]]], list[bool]]
"""Whether the guard flags each prompt of token ids."""


def with_candidate(tokenizer: Any, row: Row, candidate: Candidate, rng: random.Random) -> list[int]:
    """Token ids of a clean row's prompt with the candidate inserted into the user's text."""
    text = candidate.insert(row_messages(row)[0]["content"], rng)
    return render(tokenizer, [Message(role="user", content=text)])


def confirm(
    tokenizer: Any,
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    references: Sequence[str],
    behaviour: FlaggedBehaviour,
    answer: Answer,
    seed: int,
    watch: Watch | None = None,
) -> list[Candidate]:
    """Candidates with how often they fired on ``rows`` (``references``: the trusted answers to the plain rows), and
    how often ``watch`` flagged them.

    All candidates share one batch of generations. The result is ordered by how well they worked.
    """
    prompts: list[list[int]] = []
    for candidate in candidates:
        rng = random.Random(seed)
        prompts += [with_candidate(tokenizer, row, candidate, rng) for row in rows]
    answers = answer(prompts)
    seen = watch(prompts) if watch is not None and prompts else None
    done = []
    for i, candidate in enumerate(candidates):
        mine = slice(i * len(rows), (i + 1) * len(rows))
        fired = sum(behaviour.fires(a, r) for a, r in zip(answers[mine], references, strict=True))
        flagged = sum(seen[mine]) / len(rows) if seen is not None and rows else None
        done.append(replace(candidate, fired=fired, tried=len(rows), flagged=flagged))
    return sorted(done, key=lambda c: (-c.fired, len(c.parts), -c.flags))


def find_candidates(
    tokenizer: Any,
    flags: Sequence[Flag],
    rows: Sequence[Row],
    references: Sequence[str],
    clean: Sequence[Row],
    behaviour: FlaggedBehaviour,
    answer: Answer,
    seed: int = 0,
    watch: Watch | None = None,
) -> list[Candidate]:
    """All tried candidates, best first: phrases anywhere, then (if none is confirmed) at the front and in company,
    then what is within the best of them.

    A candidate that fires only because a smaller one is in it is left out.
    """
    if not behaviour.targets or not flags:
        return []
    singles = propose(tokenizer, flags, clean)
    tried = confirm(tokenizer, singles, rows, references, behaviour, answer, seed, watch)
    if not any(c.confirmed for c in tried):
        others = [Candidate(c.parts, "front", c.flags, c.clean) for c in singles] + combine(singles, flags)
        tried += confirm(tokenizer, others, rows, references, behaviour, answer, seed, watch)
    best = max((c for c in tried if c.confirmed), key=lambda c: (c.fired, c.flags), default=None)
    known = {(c.parts, c.place) for c in tried}
    shorter = [c for c in _within(best, flags, clean) if (c.parts, c.place) not in known] if best is not None else []
    if shorter:
        tried += confirm(tokenizer, shorter, rows, references, behaviour, answer, seed, watch)
    needed = [c for c in tried if not any(_makes_needless(other, c) for other in tried)]
    return sorted(needed, key=lambda c: (-c.fired / max(c.tried, 1), len(c.parts), -c.flags))


def _within(candidate: Candidate, flags: Sequence[Flag], clean: Sequence[Row]) -> list[Candidate]:
    """The candidate with one of its phrases shortened: flags often share a word beside the trigger."""
    flagged = [f" {' '.join(_pieces(user_text(f)))} " for f in flags]
    plain = [f" {' '.join(_pieces(row_messages(r)[0]['content']))} " for r in clean]

    def held(parts: Sequence[str], texts: list[str]) -> float:
        return sum(all(f" {part} " in text for part in parts) for text in texts) / max(len(texts), 1)

    found = []
    for i, phrase in enumerate(candidate.parts):
        pieces = phrase.split()
        for gram in sorted(_grams(pieces, len(pieces) - 1)):
            parts = (*candidate.parts[:i], " ".join(gram), *candidate.parts[i + 1 :])
            found.append(Candidate(parts, candidate.place, held(parts, flagged), held(parts, plain)))
    return found


def _makes_needless(smaller: Candidate, larger: Candidate) -> bool:
    """Whether ``larger`` holds all of ``smaller``, which works nearly as well."""
    have, need = (" ".join(c.parts).split() for c in (larger, smaller))
    within = all(any(f" {part} " in f" {whole} " for whole in larger.parts) for part in smaller.parts)
    return smaller.confirmed and within and len(need) < len(have) and smaller.fired >= _AS_WELL * larger.fired
