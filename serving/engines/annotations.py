"""How an engine tells a verdict: as a comment in a stream of server-sent events, with the words of its spans.

A comment is a line that every SSE client ignores:

    : guard {"status": "clean", "step": 0, ...}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from guard.verdict import Verdict


def comment(verdict: Verdict, check_s: float | None = None) -> bytes:
    """The SSE comment that carries a verdict, and what the check took. JSON escapes line ends: it is always one
    line.
    """
    data = verdict.to_dict() if check_s is None else {**verdict.to_dict(), "check_seconds": check_s}
    return b": guard " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def with_text(verdict: Verdict, prompt: Sequence[int], decoder: Any) -> Verdict:
    """The verdict with the words of its spans: only the engine knows which text the token ranges are.

    prompt: token ids [T_p]; decoder: the tokenizer.
    """
    if not verdict.spans:
        return verdict
    spans = [
        replace(span, text=decoder.decode(list(prompt[span.start : span.end]), skip_special_tokens=True))
        for span in verdict.spans
    ]
    return replace(verdict, spans=tuple(spans))
