"""Which words a flag hangs on: those without which the guard would have been calm.

Focus (`guard.focus`) names tokens while a request runs, and costs nothing. But what a trigger does may have left its
place in lower layers, and the last rows look elsewhere. Once a request is evidence there is time to ask again: its last
user turn is scored without each word in turn, and the words that matter are those without which the p-value rises. A
trigger that stands there twice is not found in this way: the other one still fires.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guard.template import Message, last_user_turn, render, token_ranges, with_user_text
from guard.verdict import Span

PValues = Callable[[Sequence[Sequence[int]]], np.ndarray]
"""p-values float64 [n] of n prompts of token ids; NaN for those that cannot be scored."""

_MOST_PIECES = 128  # words of a longer text are taken out several at a time
_CLEAR = 0.5  # what a word's rise (in log p) must be of the largest


@dataclass(frozen=True)
class Words:
    """Neighbouring words of a text, characters [start, end); ``weight``: their share of what all words weigh."""

    start: int
    end: int
    weight: float


def without_each(text: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Character ranges [start, end) of a text's words, and the text without each; of a text with very many words, as
    many neighbours at a time as it takes."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    size = -(-len(words) // _MOST_PIECES) or 1
    pieces = [(some[0][0], some[-1][1]) for some in (words[i : i + size] for i in range(0, len(words), size))]
    return pieces, [text[:start] + text[end:].removeprefix(" ") for start, end in pieces]


def decisive(
    pieces: Sequence[tuple[int, int]], p_value: float, p_without: Sequence[float], top: int = 3
) -> list[Words]:
    """The ``top`` runs of neighbouring pieces without which a p-value rises most, heaviest first; empty when no piece
    makes a difference.

    ``p_value`` is that of the whole text, ``p_without`` those without each piece (NaN: not scored, says nothing)."""
    rises = np.nan_to_num(np.log10(np.asarray(p_without, dtype=np.float64)) - np.log10(p_value)).clip(0.0)
    if not rises.any():
        return []
    clear = np.flatnonzero(rises >= _CLEAR * rises.max())
    runs = np.split(clear, np.flatnonzero(np.diff(clear) > 1) + 1)
    share = rises / rises.sum()
    found = [Words(pieces[run[0]][0], pieces[run[-1]][1], float(share[run].sum())) for run in runs]
    return sorted(found, key=lambda words: -words.weight)[:top]


def removal_spans(tokenizer: Any, messages: Sequence[Message], p_values: PValues, top: int = 3) -> tuple[Span, ...]:
    """`decisive` words of the last user turn, as token ranges of the rendered prompt; a prompt is scored for each word.

    Raises ValueError as `guard.template.token_ranges`.
    """
    pieces, texts = without_each(messages[last_user_turn(messages)]["content"])
    asked = [with_user_text(messages, text) for text in texts]
    whole, *without = p_values([render(tokenizer, talk) for talk in (messages, *asked)])
    found = decisive(pieces, whole, without, top)
    ranges = token_ranges(tokenizer, messages, [(words.start, words.end) for words in found])
    return tuple(Span(start, end, words.weight) for (start, end), words in zip(ranges, found, strict=True))
