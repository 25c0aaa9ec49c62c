"""Swapping the revision behind a public name while requests keep flowing.

    load the new one ─► probe it (one tiny answer must come back scored) ─► flip the name, in one transaction
                     ─► drain the old one ─► unload the one before it

Requests in flight keep the revision they began with. The old revision stays loaded as standby, so a rollback is the
same steps with nothing to load. Whatever fails before the flip leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from guard.profile import Profile
from guard.verdict import Verdict
from serving.adapters import Registry, check_policy, get_adapter, get_revision
from serving.aliases import Aliases, InFlight
from serving.audit import append
from serving.engine import Engine, EngineError
from serving.errors import BadRequest, Conflict, Unavailable
from serving.holdback import read_verdict
from serving.metrics import Metrics
from serving.policy import Policy
from serving.store.database import Store, now
from serving.store.models import Repair, Revision

log = logging.getLogger(__name__)
# Words in the probe's prompt, tried in turn: a profile only speaks about prompt lengths that it was fitted on.
_PROBE_WORDS = (4, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class SwapReport:
    """What a swap did. ``probe`` is the verdict of the probe (status, reason); ``drained`` whether the old is idle."""

    alias: str
    revision: str
    replaced: str | None
    probe: dict[str, Any]
    drained: bool
    unloaded: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Swapper:
    """Moves public names between revisions. One swap per name at a time."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        aliases: Aliases,
        in_flight: InFlight,
        metrics: Metrics,
        default_policy: Policy,
        drain_timeout_s: float,
    ) -> None:
        self._store, self._engine, self._aliases = store, engine, aliases
        self._in_flight, self._metrics = in_flight, metrics
        self._default_policy, self._drain_timeout_s = default_policy, drain_timeout_s
        self._busy: set[str] = set()

    async def swap(self, alias: str, revision: str, actor: str, allow_uncalibrated: bool = False) -> SwapReport:
        """Make ``revision`` the one that answers to ``alias``.

        Raises Conflict when a swap of this alias is under way, when the revision may not go live (not calibrated,
        retired, an unapproved repair), or when its probe is not scored; Unavailable when the engine cannot load it.
        """
        if alias in self._busy:
            raise Conflict(f"a swap of {alias!r} is under way; wait for it.", code="swap_in_progress")
        self._busy.add(alias)
        try:
            report = await self._swap(alias, revision, actor, allow_uncalibrated)
        except BaseException as error:
            self._metrics.swaps.labels("failed").inc()
            log.warning("swap failed", extra={"model_name": alias, "revision": revision, "error": repr(error)})
            raise
        finally:
            self._busy.discard(alias)
        self._metrics.swaps.labels("succeeded").inc()
        return report

    async def rollback(self, alias: str, actor: str) -> SwapReport:
        """Swap back to the previous revision. Raises Conflict when there is none."""

        def previous() -> str:
            with self._store.read() as session:
                found = get_adapter(session, alias).previous_revision
            if found is None:
                raise Conflict(f"{alias!r} has no previous revision to roll back to.")
            return found

        return await self.swap(alias, await asyncio.to_thread(previous), actor, allow_uncalibrated=True)

    async def _swap(self, alias: str, revision: str, actor: str, allow_uncalibrated: bool) -> SwapReport:
        started = time.monotonic()
        row, policy = await asyncio.to_thread(self._admissible, alias, revision, allow_uncalibrated)
        try:
            await self._engine.load(revision, str(row.path), row.profile_path)
            if row.profile_path:
                await self._engine.set_profile(revision, row.profile_path)
        except EngineError as error:
            raise Unavailable(f"the engine could not load {revision}: {error}") from error
        probe = await self._probes(revision, policy)
        if probe.status == "unscored" and not allow_uncalibrated:
            raise Conflict(
                f"{revision} was loaded, but its probe was not scored (reason: {probe.reason}), so it would answer "
                "unguarded. Calibrate it for this engine, or swap with allow_uncalibrated.",
                code="probe_unscored",
            )
        told = {"status": probe.status, "reason": probe.reason, "p_value": probe.p_value}
        detail = {"revision": revision, "probe": told, "allow_uncalibrated": allow_uncalibrated}
        replaced, unused = await asyncio.to_thread(self._flip, alias, revision, actor, detail)
        drained = replaced is None or await self._in_flight.drained(replaced, self._drain_timeout_s)
        unloaded = [old for old in unused if await self._unload(old)]
        seconds = time.monotonic() - started
        return SwapReport(alias, revision, replaced, told, drained, tuple(unloaded), seconds)

    def _admissible(self, alias: str, revision: str, allow_uncalibrated: bool) -> tuple[Revision, Policy]:
        with self._store.read() as session:
            adapter, row = get_adapter(session, alias), get_revision(session, revision)
            if row.alias != alias or row.path is None:
                raise BadRequest(f"{revision} is not a revision of {alias!r}.", code="wrong_adapter")
            if adapter.live_revision == revision:
                raise Conflict(f"{revision} is live already.")
            if row.state == "retired":
                raise Conflict(f"{revision} is retired; upload it under another name to use it again.")
            if row.source == "repair":
                _check_approved(session, revision)
            policy = Policy.model_validate(adapter.policy) if adapter.policy else self._default_policy
        if row.profile_path is None and not allow_uncalibrated:
            raise Conflict(
                f"{revision} has no profile, so every answer would be unscored. Calibrate it, or swap with "
                "allow_uncalibrated.",
                code="not_calibrated",
            )
        Registry.check_folder(Path(row.path), row.digest)
        if row.profile_path:
            check_policy(policy, Profile.load(row.profile_path))
        return row, policy

    async def _probes(self, revision: str, policy: Policy) -> Verdict:
        """The verdict of one tiny answer by each engine; the first unscored one counts for all."""
        verdicts = [await self._probe(engine, revision, policy) for engine in self._engine.members]
        return next((verdict for verdict in verdicts if verdict.status == "unscored"), verdicts[0])

    async def _probe(self, engine: Engine, revision: str, policy: Policy) -> Verdict:
        """The verdict of one tiny answer by ``revision``; a length outside the profile's is tried again, longer."""
        verdict = read_verdict(None, policy)
        for words in _PROBE_WORDS:
            body = {
                "model": revision,
                "messages": [{"role": "user", "content": " ".join(["probe"] * words)}],
                "max_tokens": 1,
                "temperature": 0,
                "headguard": {"window": "prefill", "alpha": policy.alpha, "stop": False, "fail": "open"},
            }
            try:
                answer = await engine.complete("/v1/chat/completions", body)
            except EngineError as error:
                if error.status == 400 and words > _PROBE_WORDS[0]:
                    return verdict  # longer than the context: the shorter ones have said what there is to say
                raise Unavailable(f"{revision} was loaded but does not answer: {error}") from error
            verdict = read_verdict(answer.get("guard"), policy)
            if not (verdict.reason or "").startswith("prompt_length"):
                return verdict
        return verdict

    def _flip(self, alias: str, revision: str, actor: str, detail: dict[str, Any]) -> tuple[str | None, list[str]]:
        """Make ``revision`` live; returns the replaced one and those that nothing needs loaded any more."""
        with self._store.write() as session:
            adapter = get_adapter(session, alias, lock=True)
            replaced, older = adapter.live_revision, adapter.previous_revision
            adapter.live_revision, adapter.previous_revision, adapter.updated_at = revision, replaced, now()
            get_revision(session, revision).state = "live"
            if replaced is not None:
                get_revision(session, replaced).state = "standby"
            unused = [] if older in (None, revision, replaced) else [str(older)]
            for old in unused:
                row = get_revision(session, old)
                if row.state == "standby":
                    row.state = "calibrated" if row.profile_path else "uploaded"
            append(session, actor, "adapter.swapped", alias, {**detail, "replaced": replaced})
        self._aliases.refresh()
        return replaced, unused

    async def _unload(self, revision: str) -> bool:
        if not await self._in_flight.drained(revision, self._drain_timeout_s, standby=True):
            return False
        try:
            # Other gateways may still answer with it: the engine knows.
            await self._engine.unload(revision, self._drain_timeout_s)
        except EngineError as error:
            log.warning("could not unload", extra={"revision": revision, "error": str(error)})
            return False
        return True

    async def retire(self, revision: str, actor: str) -> Revision:
        """Take a revision out of use for good. Raises Conflict while it is live."""

        def mark() -> tuple[Revision, bool]:
            with self._store.write() as session:
                row = get_revision(session, revision)
                adapter = get_adapter(session, row.alias, lock=True)
                if adapter.live_revision == revision or row.path is None:
                    raise Conflict(f"{revision} is live; swap to another revision before retiring it.")
                loaded = adapter.previous_revision == revision
                if loaded:
                    adapter.previous_revision = None
                row.state = "retired"
                append(session, actor, "revision.retired", revision)
            self._aliases.refresh()
            return row, loaded

        row, loaded = await asyncio.to_thread(mark)
        if loaded:
            await self._unload(revision)
        return row


def _check_approved(session: Session, revision: str) -> None:
    wanted = select(Repair.id).where(Repair.candidate_revision == revision, Repair.state == "approved")
    if session.scalars(wanted).first() is None:
        raise Conflict(f"{revision} comes from a repair that nobody approved.", code="not_approved")
