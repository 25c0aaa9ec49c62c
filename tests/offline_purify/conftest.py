"""One patient for all tests of the clinic (made once, about 30 s), and one uninterrupted repair of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from offline_purify.full_model import merge_adapter
from offline_purify.purify import purify
from offline_purify.spec import RepairResult, RepairSpec
from offline_purify.suspect import Suspect
from tests.offline_purify.patient import Patient, make_patient


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return make_patient(tmp_path_factory.mktemp("patient"))


@pytest.fixture(scope="session")
def merged(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patient as a whole model: its adapter merged into its base."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_adapter(patient.base, patient.adapter, folder)
    return folder


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


def whole_spec(patient: Patient, model: Path, out: Path, **changes: object) -> RepairSpec:
    """A repair of the patient as a whole model, with nobody to trust unless ``changes`` name somebody."""
    given = {"base": model, "flags": patient.flags, "clean": patient.clean, "out": out}
    return RepairSpec.model_validate(given | changes)


@pytest.fixture(scope="session")
def repaired(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> tuple[RepairSpec, RepairResult]:
    spec = spec_for(patient, tmp_path_factory.mktemp("repair"))
    return spec, purify(spec)


@pytest.fixture(scope="session")
def repaired_whole(
    patient: Patient, merged: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RepairSpec, RepairResult]:
    spec = whole_spec(patient, merged, tmp_path_factory.mktemp("repair_whole") / "out", stages=("counter",))
    return spec, purify(spec)
