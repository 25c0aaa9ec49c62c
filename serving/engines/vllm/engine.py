"""A running vLLM as the `/guard` routes see it: revisions, profiles, and what its workers say about their probes.

A revision is loaded once, under its own name, from a folder that never changes; vLLM's in-place loading is not used: it
changes weights under running answers and keeps prefixes that the old weights computed. Everything about a profile is
checked here, in the API server; the workers are only told which file to read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from guard.adapters import inspect_adapter
from guard.errors import AdapterRejected
from guard.identity import adapter_digest, parse_revision
from guard.probes.vllm.support import ENGINE
from guard.profile import NO_ADAPTER, Profile, ProfileKey
from guard.watch import Watch
from serving.engines.revisions import RevisionBooks
from serving.engines.vllm.exchange import Hold
from serving.engines.vllm.tap import Tap
from serving.errors import Conflict, Unavailable

# A worker that does not answer for this long does not answer.
_RPC_TIMEOUT_S = 60.0


class VllmEngine:
    """client: AsyncLLM; models: vLLM's OpenAIServingModels; digest: of the base; status: of one worker, as a start;
    slots: adapters that may be loaded at once (0 without LoRA); keys: the server's API keys.
    """

    def __init__(
        self,
        client: Any,
        models: Any,
        base_dir: Path,
        digest: str,
        worker: dict[str, Any],
        slots: int,
        default_watch: Watch,
        keys: tuple[str, ...] = (),
    ) -> None:
        self.name: str = models.base_model_paths[0].name
        self.base_dir, self.digest, self.slots, self.keys = base_dir, digest, slots, keys
        self.default_watch = default_watch
        self._client, self._models = client, models
        self._key, self._dtype = dict(worker["key"]), str(worker["dtype"])
        self._changing = asyncio.Lock()
        self.books = RevisionBooks(self.name)
        self.books.add(None, self._profile_key(NO_ADAPTER), None, None)
        self.tap = Tap(client, self.hold, default_watch, models.renderer.tokenizer)

    # Requests --------------------------------------------------------------------------------------------------------

    def revision_of(self, model: Any) -> str | None:
        """The revision that a request's `model` names; None is the base, which requests may also leave unnamed."""
        return None if not isinstance(model, str) or self._models.is_base_model(model) else model

    def hold(self, revision: str | None, watch: Watch) -> Hold:
        """Takes hold of a revision for one request. Raises NotFound, AlphaTooFine or GuardError."""
        detector, alpha, _ = self.books.hold(revision, watch)
        return Hold(revision, detector, alpha, partial(self.books.release, revision))

    # The /guard routes -----------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """See `Administered`. The probe is attached if it is on every worker and has seen every row it was to see."""
        workers = await self._tell("headguard_status")
        config = self._client.vllm_config
        told = [worker["profiles"] for worker in workers]
        return {
            "engine": ENGINE,
            "version": workers[0]["version"],
            "base": {"name": self.name, "digest": self.digest},
            "dtype": self._dtype,
            "max_model_len": config.model_config.max_model_len,
            "probe": {
                "attached": all(_attached(worker) for worker in workers),
                "blind": max(worker["blind"] for worker in workers),
                "heads": workers[0]["heads"],
                "key": self._key,
                "reason": next((reason for worker in workers if (reason := _blindness(worker))), None),
                "workers": [{k: v for k, v in worker.items() if k not in ("key", "profiles")} for worker in workers],
            },
            "steps": max(worker["forwards"] for worker in workers),
            "running": self.tap.in_flight,
            "waiting": 0,
            "slots": config.scheduler_config.max_num_seqs,
            "lora": {"slots": self.slots, "loaded": len(self._models.lora_requests)},
            "revisions": [self._entry(entry, told) for entry in self.books.entries()],
        }

    async def load(self, revision: str, folder: Path, profile: Path | None) -> dict[str, Any]:
        """See `Administered`. Raises AdapterRejected, ProfileMismatch or Conflict, with nothing changed."""
        _, digits = parse_revision(revision)
        async with self._changing:
            if revision in self.books:
                return self.books.entry(revision) if profile is None else await self._equip(revision, profile)
            self._check_room(revision)
            digest = (await asyncio.to_thread(inspect_adapter, folder, self.base_dir)).digest
            if not digest.startswith(digits):
                raise AdapterRejected(f"the adapter's digest begins {digest[:12]}, so it is not revision {revision}.")
            key = self._profile_key(digest)
            read = await asyncio.to_thread(Profile.load, profile, key) if profile is not None else None
            try:
                await self._load(revision, folder)
                if await asyncio.to_thread(adapter_digest, folder) != digest:
                    raise AdapterRejected(f"the files of {revision} changed while they were loaded.")
                await self._tell_profile(revision, read, profile)
            except BaseException:
                await self._drop(revision)
                raise
            self.books.add(revision, key, read, None)
        return self.books.entry(revision)

    async def unload(self, revision: str, drain_s: float) -> None:
        """See `Administered`. Raises NotFound or Conflict."""
        loop = asyncio.get_running_loop()

        async def drop() -> None:
            async with self._changing:
                await self._drop(revision)

        def unload() -> None:
            asyncio.run_coroutine_threadsafe(drop(), loop).result()

        await asyncio.to_thread(self.books.remove, revision, unload, drain_s)

    async def set_profile(self, revision: str | None, path: Path | None) -> dict[str, Any]:
        """See `Administered`. Raises NotFound or ProfileMismatch."""
        async with self._changing:
            return await self._equip(revision, path)

    async def attach(self, attached: bool) -> None:
        """See `Administered`."""
        await self._tell("headguard_attach", attached)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _profile_key(self, adapter: str) -> ProfileKey:
        return ProfileKey(self.digest, adapter, ENGINE, self._dtype, self._key)

    def _entry(self, entry: dict[str, Any], told: list[dict[str, str]]) -> dict[str, Any]:
        """A revision's entry; a profile that some worker does not have is none."""
        name = "" if entry["revision"] == self.name else entry["revision"]
        if entry["profile"] is not None and any(profiles.get(name) != entry["profile"] for profiles in told):
            return {**entry, "profile": None, "reason": "worker_without_profile"}
        return entry

    def _check_room(self, revision: str) -> None:
        if not self.slots:
            raise Conflict(f"{revision} cannot be loaded: start vLLM with --enable-lora.", code="lora_disabled")
        there = sorted(self._models.lora_requests)
        if len(there) >= self.slots:
            raise Conflict(
                f"{revision} cannot be loaded: all {self.slots} LoRA slots are taken ({', '.join(there)}). Unload one, "
                "or start vLLM with a higher --max-loras (on a CPU it needs one more than adapters loaded).",
                code="no_lora_slot",
            )

    async def _load(self, revision: str, folder: Path) -> None:
        asked = LoadLoRAAdapterRequest(lora_name=revision, lora_path=str(folder.absolute()))
        answer = await self._models.load_lora_adapter(asked)
        if isinstance(answer, ErrorResponse):
            raise AdapterRejected(f"vLLM refused {revision}: {answer.error.message}")

    async def _drop(self, revision: str) -> None:
        """Takes a revision from the front end and from the workers, as far as it got there."""
        lora = self._models.lora_requests.get(revision)
        if lora is not None:
            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=revision))
            await self._client.remove_lora(lora.lora_int_id)
        await self._tell("headguard_forget", revision)

    async def _equip(self, revision: str | None, path: Path | None) -> dict[str, Any]:
        profile = await asyncio.to_thread(self.books.read_profile, revision, path)
        await self._tell_profile(revision, profile, path)
        return self.books.equip(revision, profile)

    async def _tell_profile(self, revision: str | None, profile: Profile | None, path: Path | None) -> None:
        file = str(path.absolute()) if path is not None and profile is not None else None
        await self._tell("headguard_set_profile", revision or "", file, profile.digest if profile else None)

    async def _tell(self, call: str, *args: Any) -> list[Any]:
        """Calls every worker. Raises Unavailable when they cannot be reached."""
        work: Coroutine[Any, Any, list[Any]] = self._client.collective_rpc(call, args=args)
        try:
            async with asyncio.timeout(_RPC_TIMEOUT_S):
                return await work
        except Exception as error:
            raise Unavailable(f"the engine's workers do not answer to {call} ({type(error).__name__}).") from error


def _attached(worker: dict[str, Any]) -> bool:
    return _blindness(worker) is None


def _blindness(worker: dict[str, Any]) -> str | None:
    """Why a worker's probe does not count as attached, or None."""
    if not worker["attached"]:
        return "probe_detached"
    if worker["planned_rows"] != worker["seen_rows"]:
        return f"{worker['planned_rows'] - worker['seen_rows']} planned rows were not seen"
    return None
