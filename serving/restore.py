"""Keeping the engine in step with the database: what should be loaded is, after a restart of either side.

The database says which revisions are live or standby; each engine says what it has. The difference is loaded, checked
against the digests of the files first. It runs at start and then every few seconds, so an engine that comes later, or
comes back empty, is filled without anybody's help; until then ``/ready`` says what is missing. What nobody wants any
more for a while is unloaded: engines have room for a handful of adapters.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from sqlalchemy import select

from guard.errors import GuardError
from serving.adapters import BASE, Registry
from serving.engine import Engine, EngineError
from serving.store.database import Store
from serving.store.models import Adapter, Revision

log = logging.getLogger(__name__)


def loaded(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The engine's revisions by name, the base among them."""
    return {entry["revision"]: entry for entry in status.get("revisions", ())}


def wanted(store: Store) -> list[Revision]:
    """What should be loaded: the live and the previous revision of every adapter, and the base (blocking)."""
    with store.read() as session:
        names: set[str] = set()
        for adapter in session.scalars(select(Adapter)):
            names.update(filter(None, (adapter.live_revision, adapter.previous_revision)))
        return [row for name in sorted(names) if (row := session.get(Revision, name)) is not None]


async def restore(store: Store, engine: Engine, registry: Registry) -> dict[str, str]:
    """Load what is missing and attach profiles, in every engine. Returns what could not be done, by revision.

    Raises EngineError when an engine does not answer, after the others were seen to.
    """
    problems: dict[str, str] = {}
    silent: EngineError | None = None
    for member in engine.members:
        try:
            problems |= await _restore(store, member, registry)
        except EngineError as error:
            silent = error
    if silent is not None:
        raise silent
    return problems


async def _restore(store: Store, engine: Engine, registry: Registry) -> dict[str, str]:
    status = await engine.status()
    await asyncio.to_thread(registry.ensure_base, status["base"]["digest"])
    there = loaded(status)
    problems: dict[str, str] = {}
    for row in await asyncio.to_thread(wanted, store):
        entry = there.get(row.revision)
        try:
            if row.source != BASE and entry is None:
                await asyncio.to_thread(registry.check_folder, Path(str(row.path)), row.digest)
                await engine.load(row.revision, str(row.path), row.profile_path)
            elif row.profile_path and (entry is None or entry.get("profile") != row.profile_digest):
                await engine.set_profile(row.revision, row.profile_path)
        except (EngineError, GuardError) as error:
            problems[row.revision] = str(error)
            log.error("could not restore", extra={"revision": row.revision, "error": str(error)})
    return problems


class Leftovers:
    """Revisions that engines hold and nobody wants: unloaded when they were unwanted for so many looks in a row.

    Not at once: a swap, here or in another gateway, loads a revision before it is wanted.
    """

    def __init__(self, looks: int) -> None:
        self._looks = looks
        self._unwanted: dict[tuple[Engine, str], int] = {}

    async def sweep(self, store: Store, engine: Engine) -> list[str]:
        """One look. Returns what was unloaded; engines that do not answer are left alone."""
        keep = {row.revision for row in await asyncio.to_thread(wanted, store)}
        seen: dict[tuple[Engine, str], int] = {}
        swept = []
        for member in engine.members:
            try:
                status = await member.status()
            except EngineError:
                continue
            for name in loaded(status):
                if name == status["base"]["name"] or name in keep:
                    continue
                looks = self._unwanted.get((member, name), 0) + 1
                if looks < self._looks:
                    seen[member, name] = looks
                    continue
                try:
                    await member.unload(name)
                    swept.append(name)
                except EngineError as error:
                    log.warning("could not unload", extra={"revision": name, "error": str(error)})
        self._unwanted = seen
        return swept


async def readiness(store: Store, engine: Engine) -> list[str]:
    """Why this gateway is not ready; empty when it is.

    Ready means: the database answers, the engine's probe is attached, and every live adapter is loaded with a profile
    that matches. The base itself may be unprofiled (its answers are then unscored, and counted so).
    """
    try:
        status = await engine.status()
    except EngineError as error:
        return [f"the engine does not answer: {error}"]
    probe = status.get("probe") or {}
    reasons = (
        [] if probe.get("attached") else [f"the probe is not attached: {probe.get('reason') or 'no reason given'}"]
    )

    def live() -> list[tuple[str, str, str, str | None]]:
        with store.read() as session:
            rows = select(Adapter.alias, Revision.revision, Revision.source, Revision.profile_digest).join(
                Revision, Adapter.live_revision == Revision.revision
            )
            return [(a, r, s, d) for a, r, s, d in session.execute(rows)]

    there = loaded(status)
    for alias, revision, source, profile in await asyncio.to_thread(live):
        entry = there.get(revision)
        if source == BASE:
            continue
        if entry is None:
            reasons.append(f"{alias}: {revision} is not loaded in the engine")
        elif not entry.get("profile"):
            reasons.append(f"{alias}: {revision} has no matching profile ({entry.get('reason') or 'none attached'})")
        elif profile and entry["profile"] != profile:
            reasons.append(f"{alias}: {revision} is measured by another profile than the one attached to it")
        elif entry.get("reason"):
            reasons.append(f"{alias}: the profile of {revision} does not match: {entry['reason']}")
    return reasons
