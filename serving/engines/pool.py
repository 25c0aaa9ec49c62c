"""Several engines behind one gateway, as if they were one: requests take turns, administration goes to all.

What is said of the pool is what holds for every engine: a revision is there when all have it, the probe is attached
when all say so. An engine that cannot be reached, or has lost what the others have, is left out of the turns until it
is back; a request that found it so is asked of the next one, before anything of an answer was heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar, cast

import httpx

from serving.engines.client import EngineClient, EngineError, EngineUnavailable
from serving.events import Event

T = TypeVar("T")
_SAME = ("base", "dtype", "engine", "version")


class EnginePool:
    """members: one client each. With a single member the pool says exactly what it says."""

    def __init__(self, members: Sequence[EngineClient]) -> None:
        if not members:
            raise ValueError("a pool needs at least one engine")
        self.members = tuple(members)
        self._aside: set[EngineClient] = set()
        self._turn = 0

    async def aclose(self) -> None:
        """Closes all connections."""
        await asyncio.gather(*(member.aclose() for member in self.members))

    # Requests: one engine each ---------------------------------------------------------------------------------------

    async def complete(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See EngineClient."""
        *others, last = self._order()
        for member in others:
            try:
                return await member.complete(path, body, headers)
            except EngineError as error:
                if not _elsewhere(error):
                    raise
                self._aside.add(member)
        return await last.complete(path, body, headers)

    async def stream(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Event]:
        """See EngineClient. Closing this generator cancels the request."""
        *others, last = self._order()
        for member in (*others, last):
            events = cast(Any, member.stream(path, body, headers))
            heard = False
            try:
                async for event in events:
                    heard = True
                    yield event
                return
            except EngineError as error:
                if heard or member is last or not _elsewhere(error):
                    raise
                self._aside.add(member)
            finally:
                await events.aclose()

    def _order(self) -> list[EngineClient]:
        """Whom to ask: in turn, those that are left out last."""
        self._turn = (self._turn + 1) % len(self.members)
        turned = [*self.members[self._turn :], *self.members[: self._turn]]
        return sorted(turned, key=lambda member: member in self._aside)

    # Administration: all of them -------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        """GET /v1/models of the first engine that answers."""
        return await self._order()[0].models()

    async def status(self) -> dict[str, Any]:
        """What holds for all engines. Raises EngineUnavailable when none can be reached."""
        told = await asyncio.gather(*(member.status() for member in self.members), return_exceptions=True)
        for failure in told:
            if isinstance(failure, BaseException) and not isinstance(failure, EngineError):
                raise failure
        there = {m: t for m, t in zip(self.members, told, strict=True) if not isinstance(t, BaseException)}
        if not there:
            raise cast(EngineError, told[0])
        every = set().union(*(_by_name(status) for status in there.values()))
        self._aside = {m for m in self.members if m not in there or set(_by_name(there[m])) != every}
        absent = [m.url for m in self.members if m not in there]
        return together(list(there.values()), absent)

    async def load(self, revision: str, path: str, profile: str | None = None) -> dict[str, Any]:
        """Loads a revision everywhere; raises the first EngineError if any engine could not."""
        return (await self._all(lambda member: member.load(revision, path, profile)))[0]

    async def unload(self, revision: str, drain_s: float = 0.0) -> dict[str, Any]:
        """Unloads a revision everywhere; engines that do not have it have nothing to do."""

        async def one(member: EngineClient) -> dict[str, Any]:
            try:
                return await member.unload(revision, drain_s)
            except EngineError as error:
                if len(self.members) > 1 and error.status == 404:
                    return {"revision": revision, "unloaded": False}
                raise

        return (await self._all(one))[0]

    async def set_profile(self, revision: str, path: str | None) -> dict[str, Any]:
        """Gives a revision another profile, everywhere."""
        return (await self._all(lambda member: member.set_profile(revision, path)))[0]

    async def _all(self, work: Callable[[EngineClient], Coroutine[Any, Any, T]]) -> list[T]:
        results = await asyncio.gather(*(work(member) for member in self.members), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return cast(list[T], results)


def together(statuses: Sequence[dict[str, Any]], absent: Sequence[str] = ()) -> dict[str, Any]:
    """The status of several engines as one: what holds for all of them. absent: engines that did not answer."""
    first = statuses[0]
    if len(statuses) == 1 and not absent:
        return first
    differing = [name for name in _SAME if any(status.get(name) != first.get(name) for status in statuses)]
    keys = [(status.get("probe") or {}).get("key") for status in statuses]
    if any(key != keys[0] for key in keys):
        differing.append("probe configuration")
    probes = [status.get("probe") or {} for status in statuses]
    reasons = [f"{url} does not answer" for url in absent]
    if differing:
        reasons.append(f"the engines differ in {', '.join(differing)}")
    reasons += [str(probe.get("reason") or "no reason given") for probe in probes if not probe.get("attached")]
    tables = [_by_name(status) for status in statuses]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {
        **first,
        "max_model_len": min(status["max_model_len"] for status in statuses),
        "probe": {
            **probes[0],
            "attached": not reasons,
            "blind": sum(probe.get("blind", 0) for probe in probes),
            "reason": "; ".join(reasons) or None,
        },
        **{name: sum(status.get(name, 0) for status in statuses) for name in ("steps", "running", "waiting", "slots")},
        "revisions": [_entry([table[name] for table in tables]) for name in names],
    }


def _entry(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One revision of several engines: its profile is the one that all have."""
    profiles = {entry.get("profile") for entry in entries}
    reasons = [entry["reason"] for entry in entries if entry.get("reason")]
    same = len(profiles) == 1
    return {
        **entries[0],
        "profile": entries[0].get("profile") if same else None,
        "reason": reasons[0] if reasons else None if same else "profiles_differ",
        "in_flight": sum(entry.get("in_flight", 0) for entry in entries),
    }


def _by_name(status: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["revision"]: entry for entry in status.get("revisions", ())}


def _elsewhere(error: EngineError) -> bool:
    """Whether another engine may do better: this one is not there, or not ready, or has lost the revision."""
    if isinstance(error, EngineUnavailable):
        return isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
    return error.status == 503 or error.lost
