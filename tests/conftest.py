"""What every test shares: one torch thread (tests on two cores must not fight), and the lab models, made once."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.lab.cache import QUICK_VACCINE, SHOWN_IMPLANTS, LabPaths, ensure_tiny, ensure_vaccine

torch.set_num_threads(1)
LAB_ROOT = Path(__file__).parents[1] / "build" / "lab"


@pytest.fixture(scope="session")
def lab() -> LabPaths:
    """The tiny base and one implant of each behaviour and trigger, cached under build/lab; made on all cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        return ensure_tiny(LAB_ROOT, SHOWN_IMPLANTS)
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vaccine_file(lab: LabPaths) -> Path:
    """The tiny base's vaccine, of few variants, cached beside it; they lie in the same folder."""
    return ensure_vaccine(LAB_ROOT, plan=QUICK_VACCINE)


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow by what it needs."""
    for item in items:
        if _SLOW_FIXTURES & set(getattr(item, "fixturenames", ())) or "benchmarks" in item.path.parts:
            item.add_marker(pytest.mark.slow)
