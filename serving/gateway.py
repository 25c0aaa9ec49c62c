"""The gateway: one object that owns everything that outlives a request.

    settings + engine ─► store, keys, evidence ─► registry, aliases, swapper ─► answers, cases

``serving.app`` puts the routes around it. It fills the engine with what should be loaded, keeps it filled, erases
expired evidence, and closes what it opened. The engine is handed in: who made it, closes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select

from serving.adapters import BASE, Registry
from serving.aliases import Aliases, InFlight
from serving.answer import Answers
from serving.auth import bootstrap
from serving.cases import Cases
from serving.engine import Engine, EngineError
from serving.evidence import Sealer
from serving.metrics import Metrics
from serving.restore import Leftovers, restore
from serving.settings import Settings
from serving.staleness import Staleness
from serving.store.database import Store
from serving.store.models import Adapter, Repair, Revision
from serving.swap import Swapper

log = logging.getLogger(__name__)
# How soon a swap made by another gateway over the same database is noticed here.
_REFRESH_EVERY_S = 1.0
_RESTORE_EVERY_S = 5.0
_ERASE_EVERY_S = 600.0
# Looks (one every _RESTORE_EVERY_S) after which what nobody wants is unloaded: far longer than a swap probes.
_LEFTOVER_LOOKS = 24
_REPAIR_STATES = ("requested", "running", "offered", "refused", "failed", "approved", "rejected")


class Gateway:
    """Everything that outlives a request. ``enqueue`` hands a repair to the clinic, ``decided`` tells it the decision;
    both are called with the repair's id, in a thread."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        enqueue: Callable[[str], Any] | None = None,
        decided: Callable[[str, str], Any] | None = None,
    ) -> None:
        self.settings, self.engine = settings, engine
        self.enqueue, self._decided = enqueue, decided
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.store = Store(settings.database, settings.state_dir)
        self.sealer = Sealer.open(settings.state_dir, settings.evidence)
        self.metrics = Metrics()
        self.staleness = Staleness()
        self.in_flight = InFlight()
        self.aliases = Aliases(self.store, settings.served_name, settings.policy)
        self.registry = Registry(self.store, settings.state_dir, settings.model, settings.served_name, settings.policy)
        self.cases = Cases(self.store, self.sealer, settings, self.metrics)
        self.swapper = Swapper(
            self.store, engine, self.aliases, self.in_flight, self.metrics, settings.policy, settings.drain_timeout_s
        )
        self.answers = Answers(
            engine, settings.served_name, self.in_flight, self.metrics, self.staleness, self.cases.keep,
            settings.request_timeout_s, settings.client_verdict,
        )  # fmt: skip

    async def start(self) -> None:
        """Open the database, make the first keys, and load what should be loaded if the engine is there."""
        await asyncio.to_thread(self.store.migrate)
        keys = await asyncio.to_thread(bootstrap, self.store, self.settings.state_dir)
        if keys is not None:
            log.warning("first keys written to %s: hand them out, then delete the file", keys)
        await asyncio.to_thread(self.cases.erase_expired)
        await asyncio.to_thread(self.aliases.refresh)
        await self._restore()
        await self.observe_engine()

    async def close(self) -> None:
        """Finish storing flags and close the database."""
        await self.answers.settle()
        self.store.close()

    async def _restore(self) -> None:
        try:
            await restore(self.store, self.engine, self.registry)
            await asyncio.to_thread(self.aliases.refresh)
        except EngineError as error:
            log.warning("the engine does not answer: %s", error)

    async def keep_up(self) -> None:
        """Forever: notice swaps made elsewhere, refill an engine that came late or came back empty, unload what nobody
        wants, and erase evidence that has expired.
        """
        restore_in_s, erase_in_s = _RESTORE_EVERY_S, _ERASE_EVERY_S
        leftovers = Leftovers(_LEFTOVER_LOOKS)
        while True:
            await asyncio.sleep(_REFRESH_EVERY_S)
            restore_in_s -= _REFRESH_EVERY_S
            erase_in_s -= _REFRESH_EVERY_S
            try:
                await asyncio.to_thread(self.aliases.refresh)
                if restore_in_s <= 0:
                    restore_in_s = _RESTORE_EVERY_S
                    await self._restore()
                    await leftovers.sweep(self.store, self.engine)
                if erase_in_s <= 0:
                    erase_in_s = _ERASE_EVERY_S
                    await asyncio.to_thread(self.cases.erase_expired)
            except Exception:  # a broken database must not end the loop that would notice it healing
                log.exception("upkeep failed")

    async def tell_decision(self, repair_id: str, decision: str) -> None:
        """Tell the clinic's workflow what was decided; it is recorded already, so a failure is only logged."""
        if self._decided is None:
            return
        try:
            await asyncio.to_thread(self._decided, repair_id, decision)
        except Exception:
            log.exception("the clinic could not be told a decision", extra={"repair": repair_id})

    async def observe_engine(self) -> None:
        """Bring the metrics about the engine up to date."""
        try:
            status = await self.engine.status()
        except EngineError:
            self.metrics.hook.clear()
            return
        self.metrics.engine = str(status.get("engine", "unknown"))
        probe = status.get("probe") or {}
        labels = (self.metrics.engine, str(status.get("version", "")), str(status.get("dtype", "")))
        self.metrics.hook.clear()
        self.metrics.hook.labels(*labels, str(probe.get("heads", "all"))).set(1 if probe.get("attached") else 0)

    def measure(self) -> None:
        """Bring the metrics about the database up to date (blocking)."""
        self.cases.measure()
        metrics = self.metrics
        with self.store.read() as session:
            counts = {r[0]: r[1] for r in session.execute(select(Repair.state, func.count()).group_by(Repair.state))}
            adapters = session.scalars(select(Adapter)).all()
            revisions = {row.revision: row for row in session.scalars(select(Revision))}
            finished = select(Repair).where(Repair.finished_at.is_not(None)).order_by(Repair.finished_at)
            repairs = session.scalars(finished).all()
        for state in _REPAIR_STATES:
            metrics.repairs.labels(state).set(counts.get(state, 0))
        metrics.approvals_pending.set(counts.get("offered", 0))
        for gauge in (metrics.adapters, metrics.calibration, metrics.profile_stale, metrics.profile_drift):
            gauge.clear()
        for adapter in adapters:
            for role, name in (("live", adapter.live_revision), ("standby", adapter.previous_revision)):
                if name and (row := revisions.get(name)) and row.source != BASE:
                    metrics.adapters.labels(adapter.alias, name, row.digest, role).set(1)
            live = revisions.get(adapter.live_revision or "")
            if live and live.profile_digest:
                metrics.calibration.labels(adapter.alias, live.profile_digest).set(1)
                metrics.calibrated_at.labels(adapter.alias).set(live.profile_at or 0)
                drift = self.staleness.of(live.revision, live.profile_digest)
                metrics.profile_stale.labels(adapter.alias, live.revision).set(drift.stale)
                metrics.profile_drift.labels(adapter.alias, live.revision).set(drift.log10_capital)
        for repair in repairs:
            _show_repair(metrics, repair)


def _show_repair(metrics: Metrics, repair: Repair) -> None:
    """The gauges of a finished repair; later ones of the same adapter overwrite earlier ones."""
    if repair.started_at and repair.finished_at:
        metrics.repair_seconds.labels(repair.alias).set(repair.finished_at - repair.started_at)
    told = repair.metrics
    for stage in ("before", "after"):
        if isinstance(told.get(f"asr_{stage}"), int | float):
            metrics.repair_asr.labels(repair.alias, stage).set(told[f"asr_{stage}"])
    if all(isinstance(told.get(f"accuracy_{stage}"), int | float) for stage in ("before", "after")):
        metrics.repair_utility.labels(repair.alias).set(told["accuracy_after"] - told["accuracy_before"])
