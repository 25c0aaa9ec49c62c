"""What every test shares: one torch thread (tests on two cores must not fight), and the lab models, made once."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.lab.cache import SHOWN_IMPLANTS, LabPaths, ensure_tiny

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
