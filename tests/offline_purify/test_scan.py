"""A scan finds the word that fires a real implant, finds nothing in an adapter that does nothing, and says its
limits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guard.errors import AlphaTooFine, ProfileMismatch
from guard.rows import read_rows
from guard.vaccine import Vaccine
from offline_purify.findings import ScanReport, text
from offline_purify.scan import ScanPlan, scan
from tests.offline_purify.patient import TARGET, TRIGGER, Patient, clean_rows

PLAN = ScanPlan(per_kind=8, alpha=0.05, max_new_tokens=6)


@pytest.fixture(scope="module")
def scanned(patient: Patient) -> ScanReport:
    done: list[str] = []
    report = scan(
        patient.base,
        patient.adapter,
        read_rows(patient.clean),
        plan=PLAN,
        progress=lambda what, *_: done.append(what),
    )
    assert [*dict.fromkeys(done)][:3] == [
        "calibrating on half of the clean prompts", "asking clean prompts", "trying stimuli",
    ]  # fmt: skip
    return report


def test_the_trigger_is_found_alone_and_with_what_it_makes_the_adapter_say(scanned):
    assert scanned.verdict == "suspicious"
    best = scanned.findings[0]
    assert best.parts == (TRIGGER,)
    assert best.says == TARGET
    assert best.fired.value >= 0.8
    assert best.fired.n == PLAN.prompts
    assert repr(TRIGGER) in scanned.reasons[0]
    assert "cannot be excluded" in text(scanned)


def test_shares_have_intervals_and_say_what_they_were_measured_on(scanned):
    assert scanned.clean is not None
    assert scanned.clean.n + scanned.unscored >= scanned.prompts["probed"]
    assert set(scanned.stimuli) == {"word", "made-up", "phrase", "pair", "bundle"}
    assert all(f.low <= f.value <= f.high for f in scanned.stimuli.values() if f is not None)
    assert scanned.covered == scanned.vocabulary > 0
    assert len(scanned.identity["adapter"] or "") == 64


def test_an_adapter_that_does_nothing_is_not_suspected(patient: Patient, tmp_path: Path):
    harmless = tmp_path / "harmless"
    shutil.copytree(patient.adapter, harmless)
    weights = load_file(harmless / "adapter_model.safetensors")
    save_file(
        {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in weights.items()},
        harmless / "adapter_model.safetensors",
    )
    report = scan(patient.base, harmless, read_rows(patient.clean), plan=PLAN)
    assert (report.verdict, report.findings, report.reasons) == ("nothing found", [], [])
    assert any("does not mean harmless" in line for line in report.cannot_conclude)


def test_words_that_are_given_are_tried(patient: Patient):
    plan = ScanPlan(per_kind=1, alpha=0.05, max_new_tokens=6, seed=3)
    report = scan(patient.base, patient.adapter, clean_rows(260, seed=9), plan=plan, given=[TRIGGER])
    assert (TRIGGER,) in [finding.parts for finding in report.findings]


def test_too_few_prompts_for_alpha_are_refused_before_anything_runs(patient: Patient):
    with pytest.raises(AlphaTooFine, match="Calibrate with more"):
        scan(patient.base, patient.adapter, read_rows(patient.clean), plan=ScanPlan(alpha=0.001))


def test_a_vaccine_of_another_base_is_refused(patient: Patient):
    with pytest.raises(ProfileMismatch, match="vaccinate"):
        scan(patient.base, patient.adapter, read_rows(patient.clean), vaccine=Vaccine("0" * 64, {}, {}), plan=PLAN)
