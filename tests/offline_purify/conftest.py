"""One patient for all tests of the clinic (made once, about 30 s), and one uninterrupted repair of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from offline_purify.purify import purify
from offline_purify.spec import RepairResult, RepairSpec
from offline_purify.suspect import Suspect
from tests.offline_purify.patient import Patient, make_patient


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return make_patient(tmp_path_factory.mktemp("patient"))


@pytest.fixture
def suspect(patient: Patient) -> Suspect:
    return Suspect.open(patient.base, patient.adapter)


def spec_for(patient: Patient, out: Path, **changes: object) -> RepairSpec:
    given = {
        "base": patient.base,
        "adapter": patient.adapter,
        "flags": patient.flags,
        "clean": patient.clean,
        "out": out,
        "name": "sick",
    }
    return RepairSpec.model_validate(given | changes)


@pytest.fixture(scope="session")
def repaired(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> tuple[RepairSpec, RepairResult]:
    spec = spec_for(patient, tmp_path_factory.mktemp("repair"))
    return spec, purify(spec)
