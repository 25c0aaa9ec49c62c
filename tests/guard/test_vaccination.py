"""How much each signal counts is what the variants say, not a constant."""

from dataclasses import replace

import numpy as np
import pytest

from guard.calibration import fit_profile
from guard.detector import Detector
from guard.features import Heads, beside_length
from guard.profile import Profile
from guard.readings import Measurement
from guard.signals import MARGIN, SIGNALS, VACCINATED, fused
from guard.vaccination import BESIDE, fit_vaccine, learnt_as_today, oddness_beside
from guard.vaccine import Sample, Vaccine
from tests.guard.conftest import draw_measurement

N = 240
PROBE = {"heads": 4, "kv_heads": 2}
WIDTH = 2 * sum(Heads(4, 2).families)  # two blocks


def of_one_length(features):
    return beside_length(features, np.full(len(features), 30))


def samples(telling, count=6, forced=0.0):
    """Variants whose trigger a scorer sees by half; ``telling`` names the signal beside it that sees the rest, and as
    much as ``forced`` in texts that no trigger brought about."""
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=WIDTH) * 0.7

    def variant(number):
        fired = of_one_length(rng.normal(size=(N, WIDTH)) + pattern)
        beside = {kind: rng.exponential(0.4, (N - N // 2, 1, len(BESIDE))) for kind in ("normal", "forced")}
        beside["forced"][:, 0, BESIDE.index(telling)] += forced
        odd = rng.exponential(0.4, (N, 1, len(BESIDE)))
        odd[:, 0, BESIDE.index(telling)] += rng.exponential(2.0, N)
        normal = of_one_length(rng.normal(size=(N, WIDTH)))
        return Sample(f"v{number}", {0: normal}, {}, {0: fired}, beside={**beside, "fired": odd})

    return [variant(number) for number in range(count)]


@pytest.mark.parametrize("telling", BESIDE)
def test_the_signal_that_tells_the_variants_counts_more_than_the_one_that_does_not(telling):
    weights = fit_vaccine(samples(telling), base="b" * 64, probe=PROBE).weights
    assert all(weights[telling] > weights[other] for other in set(BESIDE) - {telling})
    assert weights[VACCINATED] == SIGNALS[VACCINATED].weight


@pytest.mark.parametrize("telling", BESIDE)
def test_a_signal_that_forced_texts_show_as_well_counts_as_little_as_it_may(telling):
    weights = fit_vaccine(samples(telling, forced=12.0), base="b" * 64, probe=PROBE).weights
    assert weights[telling] == (0.25 if SIGNALS[telling].weight else 0.0)


@pytest.mark.parametrize("odd", [False, True])
def test_where_forced_texts_look_odd_beyond_the_prompt_more_is_asked_for_there(odd):
    """The trigger shows before any token; a forced text looks a little like it after the first."""
    rng = np.random.default_rng(0)

    def variant(number):
        quiet, fired, forced = rng.normal(size=(3, N, WIDTH))
        fired[:, 0] += 6.0
        forced[:, 0] += 1.5 * odd
        quiet, fired, forced = map(of_one_length, (quiet, fired, forced))
        half = N - N // 2
        beside = {kind: rng.exponential(0.4, (half, 2, len(BESIDE))) for kind in ("normal", "forced", "fired")}
        late = {1: np.concatenate((forced, forced[:half]))}
        return Sample(f"v{number}", {0: quiet, 1: quiet}, {}, {0: fired[:half], 1: fired[:half]}, late, beside)

    weights = fit_vaccine([variant(number) for number in range(6)], base="b" * 64, probe=PROBE).weights
    assert (weights[MARGIN] > SIGNALS[VACCINATED].margin) == odd


@pytest.mark.parametrize("odd", [False, True])
def test_a_signal_that_what_must_stay_quiet_shows_as_well_counts_less(odd):
    taught = []
    for sample in samples("shift"):
        quiet = np.random.default_rng(len(taught)).exponential(0.4, (N, 1, len(BESIDE)))
        quiet[:, 0, BESIDE.index("shift")] += 12.0 * odd
        taught.append(replace(sample, quiet={0: sample.normal[0]}, beside={**sample.beside, "quiet": quiet}))
    weights = fit_vaccine(taught, base="b" * 64, probe=PROBE).weights
    assert (weights["shift"] == 0.25) == odd


def test_too_few_variants_to_leave_some_out_keep_the_usual_weights():
    weights = fit_vaccine(samples("shift", count=5), base="b" * 64, probe=PROBE).weights
    usual = {name: SIGNALS[name].weight for name in (*BESIDE, VACCINATED)}
    assert weights == {**usual, MARGIN: SIGNALS[VACCINATED].margin}


def test_who_waits_is_told_how_far_it_is():
    told = []
    fit_vaccine(samples("shift"), base="b" * 64, probe=PROBE, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # one direction from all variants, and one for each third left out


def test_a_vaccine_says_how_it_was_learnt_so_that_a_kept_one_can_be_learnt_anew(tmp_path):
    fit_vaccine(samples("shift"), base="b" * 64, probe=PROBE).save(tmp_path / "v.safetensors")
    kept = Vaccine.load(tmp_path / "v.safetensors")
    assert learnt_as_today(kept)
    limits = {"limits": {"alpha": 0.01, "forced": 0.05}}
    for learnt in (None, {}, {**kept.facts["learnt"], **limits}):
        assert not learnt_as_today(replace(kept, facts={**kept.facts, "learnt": learnt}))


def test_weights_are_kept_with_the_vaccine_and_the_profile(key, clean, tmp_path):
    vaccine = fit_vaccine(samples("confidence"), base="b" * 64, probe=PROBE)
    vaccine.save(tmp_path / "v.safetensors")
    assert Vaccine.load(tmp_path / "v.safetensors").weights == vaccine.weights
    bare = fit_profile(clean, key, seed=1)
    weighed = Profile(**{**vars(bare), "weights": {"shift": 0.25, "confidence": 2.0}})
    weighed.save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors", key)
    assert loaded.weights == weighed.weights
    # The held-out requests are weighed as new ones are: their p-values stay what they were promised to be.
    fresh = draw_measurement(np.random.default_rng(7), 400)
    usual, other = (Detector(profile, "prefill", 0.05).p_values(fresh) for profile in (bare, loaded))
    assert not np.array_equal(usual, other)
    assert (other <= 0.05).mean() < 0.1


def test_a_sum_is_weighed_by_name_and_by_the_registry_where_it_is_not_named():
    odd = np.asarray([1.0, 10.0, 100.0])
    names = ("shift", "confidence", VACCINATED)
    assert fused(odd, names, 0, {}) == pytest.approx(1 + 10 + 200)
    assert fused(odd, names, 0, {"shift": 2.0, VACCINATED: 0.5}) == pytest.approx(2 + 10 + 50)
    assert fused(odd, names, 1, {}) == pytest.approx(211 - SIGNALS[VACCINATED].margin)
    assert fused(odd, names, [0, 1], {MARGIN: 1.5}) == pytest.approx([211, 211 - 1.5])
    assert fused(odd[:2], names[:2], 1, {MARGIN: 1.5}) == pytest.approx(11)  # no vaccine, no margin


def test_what_fits_half_of_the_normal_requests_judges_the_other_half():
    clean = draw_measurement(np.random.default_rng(1), 240)
    second = np.arange(120, 240)
    found = oddness_beside(clean, clean.take(second), clean)
    assert found["normal"].shape == (120, len(clean.at), len(BESIDE))
    np.testing.assert_array_equal(found["normal"], found["fired"])
    np.testing.assert_array_equal(found["normal"], found["forced"])
    # Other requests to judge by change nothing for those that are judged; others to fit on would.
    swapped = oddness_beside(clean.take(second), clean.take(second), clean.take(second))
    assert not np.allclose(swapped["fired"], found["fired"], equal_nan=True)


def test_a_request_that_had_ended_is_no_number_at_later_checkpoints():
    clean = draw_measurement(np.random.default_rng(1), 240)
    short = Measurement(clean.prompt_len, clean.answers, {0: clean.at[0], 1: clean.at[1].take(np.arange(0, 240, 2))})
    normal = oddness_beside(short, short, short)["normal"]
    assert np.isfinite(normal[:, 0]).all()
    np.testing.assert_array_equal(np.isfinite(normal[:, 1]).all(axis=1), np.arange(120, 240) % 2 == 0)
    few = Measurement(clean.prompt_len, clean.answers, {0: clean.at[0], 1: clean.at[1].take(np.arange(10))})
    assert np.isnan(oddness_beside(few, few, few)["normal"][:, 1]).all()
