"""Public model names, and which revision answers to each right now.

A request takes one immutable ``Route`` when it starts and keeps it until it ends, whatever is swapped meanwhile: no
answer is ever begun by one revision and finished by another. ``InFlight`` counts requests per revision, so that a swap
knows when the old one has nothing left to do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from sqlalchemy import select
from sqlalchemy.orm import Session

from serving.cases import is_suspect
from serving.errors import NotFound
from serving.policy import Policy
from serving.store.database import Store
from serving.store.models import Adapter


@dataclass(frozen=True)
class Route:
    """Where a request to ``alias`` goes. ``revision`` is the engine's model name; the base routes to itself.

    ``good`` is the previous revision if that is one to fall back on: after a repair, the previous one is the suspect.
    """

    alias: str
    revision: str
    good: str | None
    policy: Policy


class Aliases:
    """The routing table: read on every request without a lock, replaced as a whole."""

    def __init__(self, store: Store, base: str, default_policy: Policy) -> None:
        self._store = store
        self._default = default_policy
        self.base = base
        self._routes: Mapping[str, Route] = MappingProxyType({})

    def refresh(self) -> None:
        """Read the table from the database (blocking). Requests that have a route keep theirs."""
        with self._store.read() as session:
            rows = session.scalars(select(Adapter).where(Adapter.live_revision.is_not(None))).all()
            routes = {row.alias: self._route(session, row) for row in rows}
        self._routes = MappingProxyType(routes)

    def _route(self, session: Session, row: Adapter) -> Route:
        policy = Policy.model_validate(row.policy) if row.policy else self._default
        assert row.live_revision is not None
        previous = row.previous_revision
        good = previous if previous and not is_suspect(session, previous) else None
        return Route(row.alias, row.live_revision, good, policy)

    def routes(self) -> tuple[Route, ...]:
        """All routes, the base first, then by name."""
        return tuple(sorted(self._routes.values(), key=lambda r: (r.alias != self.base, r.alias)))

    def route(self, model: str) -> Route:
        """The route of a public name as it is now. Raises NotFound, naming the models there are."""
        route = self._routes.get(model)
        if route is None:
            known = ", ".join(r.alias for r in self.routes())
            raise NotFound(
                f"the model {model!r} does not exist; there is: {known}.", code="model_not_found", param="model"
            )
        return route


class InFlight:
    """Requests being answered (``requests`` altogether), counted per revision. Belongs to one event loop."""

    def __init__(self) -> None:
        self._answering: Counter[str] = Counter()
        self._standing_by: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._notices: set[asyncio.Task[None]] = set()

    @property
    def requests(self) -> int:
        """Requests being answered by any revision."""
        return self._answering.total()

    @contextmanager
    def hold(self, revision: str, standby: bool = False) -> Iterator[None]:
        """Count one request of ``revision`` for as long as the block runs.

        ``standby`` keeps the revision from being unloaded because it may have to answer, without being a request.
        """
        counts = self._standing_by if standby else self._answering
        counts[revision] += 1
        try:
            yield
        finally:
            counts[revision] -= 1
            if not counts[revision]:
                del counts[revision]
                notice = asyncio.get_running_loop().create_task(self._notify())
                self._notices.add(notice)
                notice.add_done_callback(self._notices.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def count(self, revision: str) -> int:
        """Requests that ``revision`` is answering."""
        return self._answering[revision]

    async def drained(self, revision: str, timeout_s: float, standby: bool = False) -> bool:
        """Wait until ``revision`` answers no request (and, with ``standby``, none may need it).

        False when some still do after ``timeout_s``.
        """

        def idle() -> bool:
            return not self._answering[revision] and not (standby and self._standing_by[revision])

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(idle)
        except TimeoutError:
            return False
        return True
