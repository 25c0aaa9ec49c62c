"""A tiny random Llama, two revisions of one adapter and one of another base, each with a profile fitted on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.calibration import fit_profile
from guard.identity import adapter_digest, base_digest, revision_name
from guard.probes.transformers.calibrate import served_key
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from serving.engines.client import EngineClient
from serving.engines.embedded.app import create_engine_app
from serving.engines.embedded.engine import EmbeddedEngine
from serving.engines.transport import InProcessTransport
from serving.settings import Settings
from serving.store.models import Adapter, Revision
from tests.guard.probes.transformers.adapters import save_adapter
from tests.guard.probes.transformers.models import prompts_of
from tests.guard.probes.transformers.text import save_model
from tests.serving.house import House, open_house
from tests.serving.scripted import GOOD, LIVE, PROFILE, ScriptedPeer


@dataclass(frozen=True)
class Weights:
    """Folders on disk. ``first`` and ``second`` are two adapters for ``base``, with their profiles."""

    base: Path
    first: Path
    second: Path
    profiles: dict[str, Path]

    def revision(self, which: str, alias: str = "support") -> str:
        return revision_name(alias, adapter_digest(getattr(self, which)))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("weights")
    base = save_model(root / "base")
    folders = {name: save_adapter(root / name, seed) for name, seed in (("first", 1), ("second", 2))}
    runner = Runner.load(base, max_slots=32)
    prompts = prompts_of([6 + i % 58 for i in range(240)], seed=99)
    profiles: dict[str, Path] = {}
    for name in ("base", *folders):
        revision = None if name == "base" else f"{name}@sha256-{adapter_digest(folders[name])[:12]}"
        if revision:
            runner.add_adapter(revision, folders[name])
        measured = measure(runner, prompts, checkpoints=(0, 1, 2, 4, 8), adapter=revision)
        digest = adapter_digest(folders[name]) if revision else None
        profiles[name] = root / f"{name}.profile.safetensors"
        fit_profile(measured, served_key(runner, base_digest(base), digest)).save(profiles[name])
    return Weights(base, folders["first"], folders["second"], profiles)


@pytest.fixture
def database_url() -> str | None:
    """The database that the gateways of a test use: None is SQLite in their state folder."""
    return None


@pytest.fixture
def settings(weights: Weights, tmp_path: Path, database_url: str | None) -> Settings:
    return make_settings(weights.base, tmp_path / "state", database_url=database_url)


def make_settings(model: Path, state_dir: Path, **more: Any) -> Settings:
    given = {name: value for name, value in more.items() if value is not None}
    return Settings(model=model, state_dir=state_dir, served_name="base", **given)


@pytest.fixture
def engine(weights: Weights) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(weights.base, "base", max_slots=8).start()
    yield engine
    engine.close()


@pytest.fixture
def open_gateway(engine: EmbeddedEngine, settings: Settings) -> Iterator[Callable[..., House]]:
    """Opens gateways over the embedded engine; they are closed when the test ends."""
    with ExitStack() as stack:

        def opened(settings: Settings = settings, **more: Any) -> House:
            client = EngineClient(transport=InProcessTransport(create_engine_app(engine)))
            return stack.enter_context(open_house(settings, client, **more))

        yield opened


@pytest.fixture
def house(open_gateway: Callable[..., House]) -> House:
    return open_gateway()


@pytest.fixture
def live(house: House, weights: Weights) -> House:
    """A gateway where ``support`` is live with a profile, under a policy that flags next to nothing."""
    revision = house.upload("support", weights.first)["revision"]
    house.calibrate(revision, weights.profiles["first"])
    house.policy("support", alpha=0.05)
    house.ok("operator", "POST", "/admin/adapters/support/swap", json={"revision": revision})
    return house


@pytest.fixture
def peer() -> ScriptedPeer:
    return ScriptedPeer(revisions={LIVE: PROFILE, GOOD: PROFILE})


@pytest.fixture
def scripted(peer: ScriptedPeer, tmp_path: Path) -> Iterator[House]:
    """A gateway over a scripted peer, where ``support`` is live with LIVE and was GOOD before, both with PROFILE."""
    settings = Settings(model=tmp_path, state_dir=tmp_path / "state", request_timeout_s=20)
    with open_house(settings, EngineClient(transport=InProcessTransport(peer))) as house:
        with house.gateway.store.write() as session:
            session.add(
                Adapter(alias="support", live_revision=LIVE, previous_revision=GOOD, created_at=0, updated_at=0)
            )
            session.flush()
            for name in (LIVE, GOOD):
                session.add(
                    Revision(
                        revision=name, alias="support", digest="0" * 64, base_digest="0" * 64, state="live",
                        source="upload", path="-", info={}, created_by="test", created_at=0, profile_digest=PROFILE,
                    )
                )  # fmt: skip
        house.gateway.aliases.refresh()
        yield house


POSTGRES = os.environ.get("HEADGUARD_TEST_POSTGRES_URL")
