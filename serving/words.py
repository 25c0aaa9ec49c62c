"""Which words a flag hangs on (`guard.removal`), asked of the engine that serves the flagged revision.

A verdict comes with where the heads looked, which is not always at the trigger. An operator who looks at a case may ask
for more: the prompt is scored again without each of its words, before any token of an answer. These requests are no
client's: they are not counted, not kept, and yield to nobody but each other.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from guard.removal import decisive, without_each
from guard.template import last_user_turn, with_user_text
from serving.answer import PATHS
from serving.engine import Engine, EngineError
from serving.errors import Conflict, Unavailable
from serving.events import StreamBroken
from serving.holdback import read_verdict
from serving.policy import Policy

_AT_ONCE = 8


async def decisive_words(
    engine: Engine, revision: str, messages: Sequence[dict[str, Any]], alpha: float, timeout_s: float
) -> dict[str, Any]:
    """JSON: ``p_value`` of the prompt asked again, ``asked`` (how many prompts), and up to three ``words`` (``text``,
    ``weight``), heaviest first.

    Raises Conflict when the last user turn is no text or the engine cannot score the prompt, Unavailable when it does
    not answer.
    """
    try:
        text = messages[last_user_turn(messages)]["content"]
    except ValueError as error:
        raise Conflict(f"this request cannot be taken apart: {error}") from error
    if not isinstance(text, str):
        raise Conflict("this request cannot be taken apart: its last user turn is not plain text.")
    policy, gate = Policy(mode="observe", window="prefill", alpha=alpha), asyncio.Semaphore(_AT_ONCE)

    async def p_value(content: str) -> float:
        talk = with_user_text(messages, content)
        body = {"model": revision, "messages": talk, "max_tokens": 1, "temperature": 0, "stream": False}
        async with gate, asyncio.timeout(timeout_s):
            told = await engine.complete(PATHS["chat"], {**body, "headguard": policy.engine_fields()})
        found = read_verdict(told.get("guard"), policy).p_value
        return math.nan if found is None else found

    pieces, texts = without_each(text)
    asked = [asyncio.create_task(p_value(content)) for content in (text, *texts)]
    try:
        whole, *without = await asyncio.gather(*asked)
    except (EngineError, StreamBroken, TimeoutError) as error:
        raise Unavailable(f"the engine could not be asked about {revision}: is that revision loaded?") from error
    finally:
        for task in asked:  # what is still being asked when one fails, or the operator hangs up
            task.cancel()
    if math.isnan(whole):
        raise Conflict(f"the engine could not score this request again: {revision} has no profile for it.")
    found = decisive(pieces, whole, without)
    words = [{"text": text[run.start : run.end], "weight": run.weight} for run in found]
    return {"p_value": whole, "asked": len(asked), "words": words}
