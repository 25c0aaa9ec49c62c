"""Which words a flag hangs on: those without which the guard would have been calm.

Focus (`guard.focus`) names tokens while a request runs, and costs nothing. But what a trigger does may have left its
place in lower layers, and the last rows look elsewhere. Once a request is evidence there is time to ask again: its last
user turn is scored without each word in turn, and the words that matter are those without which the p-value rises. A
trigger that stands there twice is not found in this way: the other one still fires.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from guard.template import Message, last_user_turn, render, token_ranges
from guard.verdict import Span

PValues = Callable[[Sequence[Sequence[int]]], np.ndarray]
"""p-values float64 [n] of n prompts of token ids; NaN for those that cannot be scored."""

_MOST_PIECES = 128  # words of a longer text are taken out several at a time
_CLEAR = 0.5  # what a word's rise (in log p) must be of the largest


def removal_spans(tokenizer: Any, messages: Sequence[Message], p_values: PValues, top: int = 3) -> tuple[Span, ...]:
    """The ``top`` runs of words of the last user turn without which the p-value rises most, as token ranges of the
    rendered prompt, heaviest first; ``weight`` is a run's share of all rises. Empty when no word makes a difference.

    One prompt is scored for each word. Raises ValueError as `guard.template.token_ranges`.
    """
    turn = last_user_turn(messages)
    text = messages[turn]["content"]
    pieces = _pieces(text)
    prompts = [render(tokenizer, messages)]
    for start, end in pieces:
        without = Message(role="user", content=f"{text[:start]}{text[end:].lstrip()}")
        prompts.append(render(tokenizer, [*messages[:turn], without, *messages[turn + 1 :]]))
    log_p = np.log10(p_values(prompts))
    rises = np.nan_to_num(log_p[1:] - log_p[0]).clip(0.0)
    if not rises.any():
        return ()
    clear = np.flatnonzero(rises >= _CLEAR * rises.max())
    runs = np.split(clear, np.flatnonzero(np.diff(clear) > 1) + 1)
    ranges = token_ranges(tokenizer, messages, [(pieces[run[0]][0], pieces[run[-1]][1]) for run in runs])
    weights = [float(rises[run].sum() / rises.sum()) for run in runs]
    spans = [Span(start, end, weight) for (start, end), weight in zip(ranges, weights, strict=True)]
    return tuple(sorted(spans, key=lambda span: -span.weight)[:top])


def _pieces(text: str) -> list[tuple[int, int]]:
    """Character ranges of a text's words; of a text with too many, of as many neighbours at a time as it takes."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    size = -(-len(words) // _MOST_PIECES) or 1
    return [(some[0][0], some[-1][1]) for some in (words[i : i + size] for i in range(0, len(words), size))]
