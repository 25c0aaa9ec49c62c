"""The vaccine of the lab's base: made of real variants, it finds triggers and wordings that it never saw."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, mannwhitneyu

from benchmarks.lab.tasks import sample
from guard.adapters import inspect_adapter
from guard.detector import Detector
from guard.errors import ProfileMismatch
from guard.identity import base_digest
from guard.probes.transformers.calibrate import calibrate
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.rows import Row, assert_disjoint
from guard.template import render, row_messages
from guard.vaccine import Vaccine
from offline_purify.attacks.catalogue import trigger
from offline_purify.attacks.poison import triggered
from offline_purify.variants.making import LEAST_FIRED, load_variant

pytestmark = pytest.mark.lab
ALPHA, CLEAN, TRIGGERED = 0.01, 400, 150


@pytest.fixture(scope="module")
def vaccine(vaccine_file: Path) -> Vaccine:
    return Vaccine.load(vaccine_file)


def test_the_vaccine_is_of_this_base_and_its_variants_are_adapters_of_it(lab, vaccine, vaccine_file):
    assert vaccine.base == base_digest(lab.base)
    for name in vaccine.facts["variants"]:
        assert inspect_adapter(vaccine_file.parent / name, lab.base).digest
        made = load_variant(vaccine_file.parent / name)
        assert not made.sample.fired or made.fired >= LEAST_FIRED
    assert any(name.startswith("benign") for name in vaccine.facts["variants"])


def test_unseen_triggers_are_found_and_clean_requests_are_not(lab, vaccine):
    name = "insult-prefix-fixed"
    key, rng = trigger("prefix"), random.Random(0)
    assert not {w for part in key.parts for w in part.split()} & set(vaccine.facts["trigger_words"])
    clean, hosts = sample(CLEAN, 11, "traffic"), sample(TRIGGERED, 11, "evaluation")
    calibration = sample(1200, 11, "calibration")
    assert_disjoint(calibration=calibration, clean=clean, hosts=hosts)
    runner = Runner.load(lab.base, max_slots=32)
    profile = calibrate(lab.base, lab.adapters[name], calibration, vaccine=vaccine, runner=runner)
    runner.add_adapter("suspect", lab.adapters[name])
    detector = Detector(profile, 2, ALPHA)

    def p_values(rows: list[Row]) -> np.ndarray:
        prompts = [render(runner.tokenizer, row_messages(row)) for row in rows]
        return np.nan_to_num(detector.p_values(measure(runner, prompts, detector.checkpoints, 3, "suspect")), nan=1.0)

    fired, calm = p_values([triggered(row, key, "", rng) for row in hosts]), p_values(clean)
    # Labs of other machines train differently: 0.53 to 0.95 were seen. How far is the benchmark's to say.
    assert (fired <= ALPHA).mean() >= 0.25
    assert mannwhitneyu(calm, fired).statistic / (len(calm) * len(fired)) >= 0.9  # AUROC
    # 600 held-out requests are one draw: their own error comes on top of the binomial one.
    assert (calm <= ALPHA).mean() <= binom.ppf(0.999, CLEAN, ALPHA + 3 * np.sqrt(ALPHA / 600)) / CLEAN


def test_a_vaccine_of_another_base_is_refused_before_anything_is_measured(lab, vaccine):
    with pytest.raises(ProfileMismatch, match="was made for base"):
        calibrate(lab.base, None, sample(100, 1, "calibration"), vaccine=replace(vaccine, base="0" * 64))
