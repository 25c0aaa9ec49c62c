"""A profile in a file, for probes that are driven by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guard.calibration import fit_profile


@pytest.fixture(scope="session")
def profile(clean: Any, key: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    fit_profile(clean, key, seed=1, facts={}).save(path)
    return path
