"""Profile and detector on measurements whose distribution is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy.stats import binom

from guard.calibration import fit_profile
from guard.detector import Detector
from guard.errors import AlphaTooFine, CalibrationError, ProfileMismatch
from guard.profile import Profile
from guard.readings import Measurement
from guard.verdict import Verdict
from tests.guard.conftest import draw_measurement, draw_request


@pytest.fixture(scope="module")
def profile(clean, key, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    fit_profile(clean, key, seed=1, facts={"prompts": "drawn"}).save(path)
    return Profile.load(path, key)


def run(detector, request):
    tokens, readings = request
    track = detector.open(tokens)
    for reading in readings:
        detector.observe(track, reading)
    return detector.close(track)


@pytest.mark.slow
def test_clean_requests_are_flagged_no_more_often_than_alpha(profile):
    rng = np.random.default_rng(7)
    detector, n = Detector(profile, "all", 0.05), 400
    flagged = sum(run(detector, draw_request(rng)).status == "flagged" for _ in range(n))
    # The calibration is one draw of 200: allow its own error on top of the binomial one.
    assert flagged <= binom.ppf(0.995, n, 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200))


def test_heads_that_converge_on_two_tokens_are_flagged_and_the_tokens_named(profile):
    rng = np.random.default_rng(3)
    verdicts = [run(Detector(profile, "all", 0.02), draw_request(rng, together=0.6)) for _ in range(20)]
    assert all(v.status == "flagged" and v.final and v.p_value <= 0.02 for v in verdicts)
    assert all(v.spans[0].start <= 20 < v.spans[0].end for v in verdicts)
    assert all(len(v.heads) == 5 and v.heads[0].score >= v.heads[-1].score for v in verdicts)


def test_prefill_window_decides_on_the_row_of_the_last_prompt_position_alone(profile):
    rng = np.random.default_rng(4)
    detector = Detector(profile, "prefill", 0.02)
    tokens, readings = draw_request(rng, together=0.8)
    track = detector.open(tokens)
    verdict = detector.observe(track, readings[0])
    assert (verdict.status, verdict.step, verdict.final) == ("flagged", 0, True)
    assert detector.observe(track, readings[1]) == verdict


def test_a_verdict_says_how_many_requests_it_was_ranked_among(profile):
    verdict = run(Detector(profile, "all", 0.02), draw_request(np.random.default_rng(8)))
    ranked = verdict.p_value * (verdict.held_out + 1)
    assert verdict.held_out == len(profile.prompt_len)
    assert ranked == pytest.approx(round(ranked))


def test_a_flag_is_never_taken_back(profile):
    rng = np.random.default_rng(5)
    detector = Detector(profile, "all", 0.02)
    tokens, odd = draw_request(rng, together=0.8)
    track = detector.open(tokens)
    first = detector.observe(track, odd[0])
    for reading in draw_request(rng)[1][1:]:
        assert detector.observe(track, reading) == first


def test_the_text_of_an_answer_cannot_change_what_its_opening_said(profile):
    rng = np.random.default_rng(9)
    for name in ("shift", "confidence"):
        detector = Detector(profile, "all", 0.02, (name,))
        tokens, readings = draw_request(rng)
        while len(readings) < 3:
            tokens, readings = draw_request(rng)
        track = detector.open(tokens)
        first = detector.observe(track, readings[0])
        for reading in readings[1:]:
            shouted = replace(
                reading, gram=reading.gram * 3, sink=reading.sink * 0, norms=reading.norms * 3,
                logprobs=(0.0, *reading.logprobs[1:]),
            )  # fmt: skip
            assert detector.observe(track, shouted).p_value == first.p_value


def test_the_spans_of_a_later_flag_are_where_heads_looked_before_there_was_an_answer(profile):
    detector = Detector(profile, "all", 0.02, ("p99",))
    rng = np.random.default_rng(9)
    plain, pulled = draw_request(rng), draw_request(rng, together=0.8)
    elsewhere = torch.zeros(60)
    elsewhere[5] = 100.0
    opening = replace(plain[1][0], focus=pulled[1][0].focus)
    track = detector.open(len(opening.focus))
    assert detector.observe(track, opening).status == "clean"
    opening.focus.zero_()  # the engine goes on with what it handed over
    verdict = detector.observe(track, replace(pulled[1][1], focus=elsewhere[: len(opening.focus)]))
    assert (verdict.status, verdict.step) == ("flagged", 1)
    assert verdict.spans[0].start <= 20 < verdict.spans[0].end
    assert not any(span.start <= 5 < span.end for span in verdict.spans)


def test_a_request_whose_first_row_was_missed_stays_unscored(profile):
    tokens, readings = draw_request(np.random.default_rng(10))
    verdict = run(Detector(profile, "all", 0.05), (tokens, readings[1:]))
    assert (verdict.status, verdict.reason) == ("unscored", "not_measured")


def test_what_the_engine_does_to_a_reading_it_handed_over_changes_nothing(profile):
    request = draw_request(np.random.default_rng(12))
    detector = Detector(profile, "all", 0.05)
    expected = run(detector, request)
    tokens, readings = request
    track = detector.open(tokens)
    own = {name: getattr(readings[0], name).clone() for name in ("gram", "sink", "norms")}
    detector.observe(track, replace(readings[0], **own))
    for told in own.values():
        told.zero_()
    for reading in readings[1:]:
        detector.observe(track, reading)
    assert detector.close(track) == expected


def test_what_cannot_be_scored_is_unscored_with_its_reason(profile):
    detector = Detector(profile, "all", 0.05)
    _, readings = draw_request(np.random.default_rng(6))
    assert run(detector, (4000, readings)).reason == "prompt_length"
    assert run(detector, (50, [])).reason == "not_measured"
    broken = replace(readings[0], gram=torch.full_like(readings[0].gram, float("nan")))
    verdict = run(detector, (50, [broken, *readings[1:]]))
    assert (verdict.status, verdict.reason) == ("unscored", "non_finite")


def test_alpha_below_the_calibrations_reach_is_an_error_that_says_what_is_possible(profile):
    with pytest.raises(AlphaTooFine, match="Calibrate with more"):
        Detector(profile, "all", 0.001)
    assert profile.smallest_alpha() == pytest.approx(1 / 200)


def test_saved_and_loaded_profile_gives_the_same_verdicts(clean, key, profile):
    fresh = fit_profile(clean, key, seed=1)
    request = draw_request(np.random.default_rng(8), together=0.4)
    one, other = (run(Detector(p, "all", 0.05), request) for p in (fresh, profile))
    assert replace(one, profile=None) == replace(other, profile=None)
    assert Verdict.from_dict(other.to_dict()) == other


@pytest.mark.parametrize(
    ("field", "value"),
    [("base", "0" * 64), ("adapter", "none"), ("engine", "vllm"), ("dtype", "bfloat16"), ("probe", {"rows": "other"})],
)
def test_a_profile_of_anything_else_is_refused_by_field(profile, key, field, value):
    with pytest.raises(ProfileMismatch, match=field):
        profile.check(replace(key, **{field: value}))


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    (tmp_path / "text").write_text("no")
    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors", "absent"):
        with pytest.raises(ProfileMismatch, match=name):
            Profile.load(tmp_path / name)


def test_too_few_clean_requests_are_refused_with_the_number_needed(key):
    with pytest.raises(CalibrationError, match="80 are needed"):
        fit_profile(draw_measurement(np.random.default_rng(0), 60), key)


def test_requests_with_broken_measurements_are_left_out_and_counted(clean, key):
    gram = clean.at[0].gram.clone()
    gram[:3] = float("inf")
    broken = Measurement(clean.prompt_len, clean.answers, {**clean.at, 0: replace(clean.at[0], gram=gram)})
    assert fit_profile(broken, key).facts["n_unusable"] == 3
