"""What every test shares: its part of the processors, and the lab models, made once.

`make test` runs two files at a time, each in one of two processes (pytest-xdist)."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.lab.cache import SHOWN_IMPLANTS, LabPaths, ensure_tiny, ensure_vaccine

torch.set_num_threads(1)
# What models train with, in this process and those that tests start: processes side by side must not fight.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
LAB_ROOT = Path(__file__).parents[1] / "build" / "lab"


@pytest.fixture(scope="session")
def lab() -> LabPaths:
    """The tiny base and one implant of each behaviour and trigger, cached under build/lab."""
    torch.set_num_threads(THREADS)
    try:
        return ensure_tiny(LAB_ROOT, SHOWN_IMPLANTS)
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vaccine_file(lab: LabPaths) -> Path:
    """The tiny base's vaccine, of few variants, cached beside it; they lie in the same folder."""
    return ensure_vaccine(LAB_ROOT)


# Fixtures that train a model or start a server: what uses one is left out of `make check`, and so is the lab.
_SLOW_FIXTURES = {
    "patient",
    "repaired",
    "lab",
    "vaccine_file",
    "demo",
    "live",
    "house",
    "killed",
    "small_base",
    "engine",
    "weights",
    "files",
}


def _fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow by what it needs; what needs the lab begins first, since it takes longest."""
    for item in items:
        if _SLOW_FIXTURES & _fixtures(item) or "benchmarks" in item.path.parts:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not {"lab", "demo"} & _fixtures(item))
