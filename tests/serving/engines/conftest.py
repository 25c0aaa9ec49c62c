"""A running engine over a random tiny model, real PEFT adapters, and a profile fitted on it."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

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
from tests.guard.probes.transformers.adapters import save_adapter
from tests.guard.probes.transformers.models import prompts_of
from tests.guard.probes.transformers.text import save_model


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Files:
    """A base folder, adapter folders by revision name, and the base's profile; ``late`` is another one of its, whose
    signal goes on reading after the first checkpoint.
    """

    base: Path
    adapters: dict[str, Path]
    profile: Path
    late: Path

    @property
    def a(self) -> str:
        return next(iter(self.adapters))

    @property
    def b(self) -> str:
        return list(self.adapters)[1]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    root = tmp_path_factory.mktemp("engine")
    base = save_model(root / "base")
    adapters = {}
    for name, seed in (("alpha", 1), ("beta", 2)):
        folder = save_adapter(root / name, seed)
        adapters[revision_name(name, adapter_digest(folder))] = folder
    runner = Runner.load(base, max_slots=32)
    # Clean traffic of the random model: prompts of 6 to 29 random words, as the tests send.
    prompts = prompts_of([6 + i % 24 for i in range(240)], seed=99)
    measurement = measure(runner, prompts, checkpoints=(0, 1, 2, 4, 8))
    profile = root / "profile.safetensors"
    key = served_key(runner, base_digest(base), None)
    fit_profile(measurement, key).save(profile)
    late = root / "late.safetensors"
    fit_profile(measurement, key, signals=("p99",)).save(late)
    return Files(base, adapters, profile, late)


@pytest.fixture
def engine(files):
    engine = EmbeddedEngine(files.base, "tiny", files.profile, max_slots=8, max_queue=64).start()
    for revision, folder in files.adapters.items():
        engine.load(revision, folder)
    yield engine
    engine.close()


@pytest.fixture
async def client(engine):
    client = EngineClient(transport=InProcessTransport(create_engine_app(engine)))
    yield client
    await client.aclose()


async def settled(engine, condition):
    """Waits, without a clock, until `condition` holds: the worker needs its turn."""
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"never came true: {engine.status()}")
