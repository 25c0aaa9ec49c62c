"""One real `vllm serve` with the guard's plugin for all tests, started as `headguard serve` starts it, and profiles
that were measured through vLLM's own kernels.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from guard.calibration import fit_profile
from guard.identity import adapter_digest, base_digest, revision_name
from guard.profile import NO_ADAPTER, ProfileKey
from serving.engines.client import EngineClient
from serving.settings import Settings
from tests.guard.probes.transformers.models import prompts_of
from tests.serving.engines.vllm.weights import save_adapter, save_base
from tests.serving.house import House, open_house

ARGUMENTS = ("--dtype", "float32", "--max-model-len", "1000", "--max-num-seqs", "32", "--max-lora-rank", "8")
STEPS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Adapters:
    """Folders on disk: the base, adapters of it and their profiles by name ("base" too; "late" is also the base's)."""

    base: Path
    folders: dict[str, Path]
    profiles: dict[str, Path]

    def revision(self, name: str, alias: str = "support") -> str:
        return revision_name(alias, adapter_digest(self.folders[name]))


@dataclass
class Served:
    """A guarded vLLM that runs."""

    url: str
    key: str
    pids: Callable[[], list[int]]

    def client(self) -> EngineClient:
        return EngineClient(self.url, headers={"authorization": f"Bearer {self.key}"}, timeout_s=60)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    pytest.importorskip("vllm")
    return make_adapters(tmp_path_factory.mktemp("vllm"))


def make_adapters(root: Path) -> Adapters:
    from vllm.lora.request import LoRARequest

    from guard.probes.vllm.measure import OfflineEngine

    base = save_base(root / "base")
    folders = {name: save_adapter(root / name, seed) for seed, name in enumerate(("first", "second", "third"), 1)}
    engine = OfflineEngine(
        base, lora_rank=8, max_loras=4, max_model_len=1000, max_num_seqs=32, generation_config="vllm"
    )
    prompts = prompts_of([8 + i % 56 for i in range(240)], seed=99)
    profiles = {}
    try:
        status = engine.status()
        for number, name in enumerate(("base", *folders)):
            lora = LoRARequest(name, number, str(folders[name])) if name in folders else None
            measured = engine.measure(prompts, STEPS, adapters=[lora] * len(prompts))
            digest = adapter_digest(folders[name]) if name in folders else NO_ADAPTER
            key = ProfileKey(base_digest(base), digest, "vllm", status["dtype"], status["key"])
            profiles[name] = root / f"{name}.profile.safetensors"
            fit_profile(measured, key).save(profiles[name])
            if name == "base":  # one whose signal goes on reading after the first checkpoint
                profiles["late"] = root / "late.profile.safetensors"
                fit_profile(measured, key, signals=("p99",)).save(profiles["late"])
    finally:
        engine.close()
    return Adapters(base, folders, profiles)


@pytest.fixture(scope="session")
def served(adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from serving.engines.vllm.launcher import VllmServer

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    log = tmp_path_factory.mktemp("logs") / "vllm.log"
    server = VllmServer(adapters.base, "base", ARGUMENTS, log)
    server.start()
    try:
        yield Served(server.url, server.key, lambda: server.pids)
        assert server.starts == 1, f"vLLM died in the tests: {log.read_text()[-4000:]}"
    finally:
        server.close()


@pytest.fixture
def emptied(served: Served) -> Iterator[Served]:
    """The engine, as it was found: nothing loaded, no profile, the probe attached."""
    yield served
    asyncio.run(_empty(served.client()))


async def _empty(client: EngineClient) -> None:
    try:
        await client._call("PUT", "/guard/probe", {"attached": True})
        await client.set_profile("base", None)
        for entry in (await client.status())["revisions"]:
            if entry["revision"] != "base":
                await client.unload(entry["revision"], drain_s=30)
    finally:
        await client.aclose()


@pytest.fixture
async def client(emptied: Served) -> EngineClient:
    """The engine's own API, as a gateway sees it. Closed with the loop."""
    return emptied.client()


@pytest.fixture
def open_gateway(emptied: Served, adapters: Adapters, tmp_path: Path) -> Iterator[Callable[..., House]]:
    """Opens gateways over the engine; those without a state folder of their own share one."""
    with ExitStack() as stack:

        def opened(state: str = "state", **more: object) -> House:
            settings = Settings(model=adapters.base, state_dir=tmp_path / state, served_name="base", **more)
            return stack.enter_context(open_house(settings, emptied.client()))

        yield opened


@pytest.fixture
def house(open_gateway: Callable[..., House]) -> House:
    return open_gateway()


@pytest.fixture
def live(house: House, adapters: Adapters) -> House:
    """A gateway where ``support`` is live with the first adapter and its profile."""
    go_live(house, adapters, "first")
    return house


def admit(house: House, adapters: Adapters, name: str, alias: str = "support") -> str:
    """Uploads an adapter with its profile. Returns the revision."""
    revision = house.upload(alias, adapters.folders[name])["revision"]
    house.calibrate(revision, adapters.profiles[name])
    return revision


def go_live(house: House, adapters: Adapters, name: str, alias: str = "support") -> str:
    """Uploads an adapter with its profile and swaps it in, under a policy that its calibration supports."""
    revision = admit(house, adapters, name, alias)
    house.policy(alias, alpha=0.05)
    house.ok("operator", "POST", f"/admin/adapters/{alias}/swap", json={"revision": revision})
    return revision
