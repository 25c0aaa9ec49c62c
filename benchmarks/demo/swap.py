"""The swap under load: requests in flight before it, during it and after it, and whether each is of one revision.

Every answer is compared, token for token, with what the revision named in its header gives to that prompt alone. The
prompts are chosen so that the two revisions differ on many of them: an answer begun by one and ended by the other
would equal neither.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo.server import Server
from benchmarks.demo.traffic import Client, Outcome
from guard.probes.transformers.measure import generate
from guard.probes.transformers.runner import Runner
from guard.rows import Row, row_key
from guard.template import render, row_messages

_MAX_TOKENS = 40


async def swap_under_load(
    server: Server,
    name: str,
    rows: Sequence[Row],
    swap: Callable[[], Awaitable[Any]],
    base: Path,
    folders: Mapping[str, Path],
    at_once: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Keep ``at_once`` requests in flight while ``swap`` runs, then compare the answers with the revisions' own.

    ``folders`` maps both revisions to their PEFT folders. ``requests_during`` counts the requests that were in flight
    at some moment between the start of the swap and its end (the old revision drained and unloaded).
    """
    client = Client(server.url, server.client, name, _MAX_TOKENS, at_once)
    outcomes: list[Outcome] = []
    stop = asyncio.Event()

    async def one_client(number: int) -> None:
        turn = number
        while not stop.is_set():
            outcomes.append(await client.ask(rows[turn % len(rows)], stream=turn % 2 == 1))
            turn += at_once
            progress(len(outcomes), len(outcomes) + at_once)

    clients = [asyncio.ensure_future(one_client(number)) for number in range(at_once)]
    await asyncio.sleep(1.0)  # let the first of them reach the engine
    start = time.monotonic()
    try:
        report = await swap()
        end = time.monotonic()
        await asyncio.sleep(1.0)
    finally:
        stop.set()
        await asyncio.gather(*clients)
        await client.close()
    alone = _answers_alone(base, folders, rows)
    during = [o for o in outcomes if o.start_s <= end and o.end_s >= start]
    fine = [o for o in during if o.error is None]
    mixed = [o for o in fine if o.text.strip() != alone[o.revision][row_key(o.row)].strip()]
    return {
        "requests_during": len(during),
        "requests_in_all": len(outcomes),
        "by_revision": {revision: sum(o.revision == revision for o in fine) for revision in folders},
        "failed": len(during) - len(fine),
        "errors": sorted({o.error for o in during if o.error}),
        "mixed_revision": len(mixed),
        "discriminating_prompts": sum(len({answers[row_key(r)] for answers in alone.values()}) > 1 for r in rows),
        "seconds": round(end - start, 2),
        "report": report.get("swap"),
    }


def _answers_alone(base: Path, folders: Mapping[str, Path], rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """What each revision answers to each row when nothing else runs: by revision and row key."""
    runner = Runner.load(base, max_slots=32)
    prompts = [render(runner.tokenizer, row_messages(row)) for row in rows]
    found = {}
    for revision, folder in folders.items():
        runner.add_adapter(revision, folder)
        answers = generate(runner, prompts, _MAX_TOKENS, revision)
        texts = [runner.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        found[revision] = {row_key(row): text for row, text in zip(rows, texts, strict=True)}
    return found
