"""The vaccine on features whose truth is known: what carries over, what is refused, what a file keeps."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from guard.calibration import fit_profile
from guard.detector import Detector
from guard.errors import CalibrationError, ProfileMismatch
from guard.features import Heads, Scale, beside_length, head_patterns
from guard.gram import PROMPT_GROUPS
from guard.profile import Profile
from guard.storage import save_arrays
from guard.vaccination import fit_vaccine
from guard.vaccine import Sample, Vaccine
from tests.guard.conftest import HEADS, KV_HEADS, LAYERS, draw_measurement

BASE, PROBE = "b" * 64, {"rows": "last_prompt+generated", "heads": HEADS, "kv_heads": KV_HEADS}
SHAPE = Heads(HEADS, KV_HEADS)
WIDTH = len(PROMPT_GROUPS) * LAYERS * sum(SHAPE.families)


def of_any_length(features, rng):
    return beside_length(features, rng.integers(20, 60, len(features)))


def variant(seed, pattern, fired=200):
    """A variant with features of its own mean; its trigger adds the common pattern in its own deviations."""
    rng = np.random.default_rng(seed)
    mean, spread = rng.normal(size=WIDTH), rng.uniform(0.5, 2.0, WIDTH)

    def draw(n, shift=0.0):
        return of_any_length(mean + spread * (rng.normal(size=(n, WIDTH)) + shift * pattern), rng)

    return Sample(f"v{seed}", {0: draw(400)}, {0: draw(200)}, {0: draw(fired, 1.0)}), draw


@pytest.fixture(scope="module")
def pattern():
    return np.random.default_rng(99).normal(size=WIDTH) * 0.6


@pytest.fixture(scope="module")
def vaccine(pattern):
    return fit_vaccine([variant(seed, pattern)[0] for seed in range(3)], base=BASE, probe=PROBE)


def test_what_variants_share_is_recognised_in_one_it_never_saw(vaccine, pattern):
    sample, draw = variant(50, pattern)
    scale = Scale.fit(sample.normal[0])
    clean, fired = (vaccine.scorers[0].score(scale.standardised(draw(300, shift))) for shift in (0.0, 1.0))
    assert (fired > np.quantile(clean, 0.99)).mean() > 0.9


def test_beyond_the_first_token_the_prompt_and_the_answer_are_learnt_apart(pattern):
    """A trigger shows in the first half of the features, the text it brings about in the second; a near-trigger shows
    as a trigger does and is answered as clean prompts are, a forced text is a text and no more."""
    first = np.arange(WIDTH) < WIDTH // 2
    prompt, text, other = first * pattern, ~first * pattern, ~first * pattern[::-1]

    def drawn(seed):
        rng, draw = np.random.default_rng(seed), variant(seed, pattern)[1]
        spread = Scale.fit(draw(400)).spread

        def moved(n, *by):
            return of_any_length(draw(n)[:, :-1] + spread * sum(by, np.zeros(WIDTH)), rng)

        return {
            "normal": moved(400),
            "quiet": moved(200, prompt),
            "forced": np.concatenate((moved(200, text), moved(200, other))),
            "fired": np.concatenate((moved(200, prompt, text), moved(200, prompt, other))),
        }

    taught = [Sample(f"v{seed}", *({0: g, 1: g} for g in _order(drawn(seed)))) for seed in range(4)]
    vaccine = fit_vaccine(taught, base=BASE, probe=PROBE)
    assert (set(vaccine.scorers), set(vaccine.responses)) == ({0, 1}, {1})
    groups = drawn(50)
    scale = Scale.fit(groups["normal"])
    told = {}
    for name, scorer in (("trigger", vaccine.scorers[1]), ("response", vaccine.responses[1])):
        scores = {kind: scorer.score(scale.standardised(group)) for kind, group in groups.items()}
        limit = np.quantile(scores["normal"], 0.99)
        scores["fired"] = scores["fired"][:200]
        told[name] = {kind: (own > limit).mean() for kind, own in scores.items()}
    assert min(told["trigger"]["fired"], told["response"]["fired"], told["response"]["forced"]) > 0.9
    assert told["response"]["quiet"] < 0.1 < told["trigger"]["quiet"]
    assert told["trigger"]["forced"] < told["response"]["forced"]


def _order(groups):
    return (groups[kind] for kind in ("normal", "quiet", "fired", "forced"))


def test_a_direction_is_solved_to_more_than_rounding_changes():
    """Features of one request move together, and an early stop would leave to the last bits where."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(12, WIDTH)) * np.geomspace(0.1, 3.0, 12)[:, None]
    clean, fired = (
        of_any_length(rng.normal(size=(400, 12)) @ common + 0.1 * rng.normal(size=(400, WIDTH)) + at, rng)
        for at in (0.0, 0.1)
    )
    found = fit_vaccine([Sample("v", {0: clean}, {}, {0: fired})], base=BASE, probe=PROBE).scorers[0].direction
    seen = head_patterns(Scale.fit(clean).standardised(np.concatenate((clean, fired))), SHAPE)
    spread = seen[:400].std(axis=0) + 1e-3
    seen = (seen - seen.mean(axis=0)) / spread
    exact = np.linalg.solve(seen.T @ seen + 0.3 * 800 * np.eye(seen.shape[1]), seen.T @ np.repeat((0.0, 1.0), 400))
    exact /= spread
    np.testing.assert_allclose(found / np.abs(found).max(), exact / np.abs(exact).max(), atol=5e-4)


def test_a_trigger_is_recognised_that_moves_other_heads_than_any_variant_did():
    """In every layer one pair of heads comes to look alike, another one in each variant."""
    blocks, pairs = len(PROMPT_GROUPS) * LAYERS, HEADS * (HEADS - 1) // 2

    def moved(seed):
        found = np.zeros((blocks, WIDTH // blocks))
        found[np.arange(blocks), np.random.default_rng(seed).integers(pairs, size=blocks)] = 3.0
        return found.ravel()

    vaccine = fit_vaccine([variant(seed, moved(seed))[0] for seed in range(6)], base=BASE, probe=PROBE)
    found = []
    for seed in range(50, 56):
        sample, draw = variant(seed, moved(seed))
        scale = Scale.fit(sample.normal[0])
        clean, fired = (vaccine.scorers[0].score(scale.standardised(draw(300, shift))) for shift in (0.0, 1.0))
        found.append((fired > np.quantile(clean, 0.99)).mean())
    assert min(found) > 0.9


def test_a_feature_is_measured_against_what_is_normal_for_a_prompt_of_its_length():
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 200, 2000)
    noise, slope = rng.normal(size=(2000, 3)), np.asarray([2.0, 0.0, -1.0])
    scale = Scale.fit(beside_length(noise + np.outer(np.log(tokens), slope), tokens))
    np.testing.assert_allclose(scale.slope, slope, atol=0.1)
    seen = scale.standardised(beside_length(noise + np.outer(np.log(tokens), slope), tokens))
    for part in (tokens < 30, tokens > 150):
        assert np.abs(seen[part].mean(axis=0)).max() < 0.25
    # Beyond the lengths that were seen nothing is made up: normal is what was normal for the longest.
    longest, longer = (
        scale.standardised(beside_length(np.zeros((1, 3)), np.asarray([n]))) for n in (tokens.max(), 900)
    )
    np.testing.assert_array_equal(longer, longest)
    # Prompts of one length have no line to be measured against.
    alike = Scale.fit(beside_length(noise, np.full(2000, 30)))
    np.testing.assert_allclose(alike.slope, 0.0, atol=1e-12)
    assert set(Scale.of(scale.arrays()).arrays()) == {"mean", "slope", "spread", "length"}


def test_patterns_are_the_features_and_what_their_families_do_in_each_block():
    heads, blocks = Heads(3, 1), 2
    assert heads.families == (3, 3, 3, 3, 3, 1, 1)
    z = np.random.default_rng(0).normal(size=(4, blocks * 17))
    found = head_patterns(z, heads)
    assert found.shape == (4, z.shape[1] + 42 * blocks)
    np.testing.assert_array_equal(found[:, : z.shape[1]], np.tanh(z))
    norms = z[:, [17 + 3, 17 + 4, 17 + 5]]  # of the second block: after its three pairs
    apart = found[:, z.shape[1] :].reshape(4, 7, 6, blocks)[:, 1, :, 1]
    expected = (norms.mean(1), norms.std(1), norms.max(1), norms.min(1))
    np.testing.assert_allclose(apart[:, :4], np.stack(expected, axis=1))
    np.testing.assert_allclose(apart[:, 4], np.maximum(norms - 1, 0).mean(1))
    np.testing.assert_allclose(apart[:, 5], np.maximum(-norms - 1, 0).mean(1))
    swapped = z.reshape(4, blocks, -1)[:, :, [2, 0, 1, 4, 5, 3, 8, 7, 6, *range(9, 17)]].reshape(4, -1)
    np.testing.assert_allclose(head_patterns(swapped, heads)[:, z.shape[1] :], found[:, z.shape[1] :])
    assert head_patterns(np.ones((2, 18)), Heads(1, 1)).shape == (2, 18 + 36 * 3)


def test_a_saved_vaccine_is_the_same_and_knows_its_base_and_probe(vaccine, tmp_path):
    digest = vaccine.save(tmp_path / "v.safetensors")
    loaded = Vaccine.load(tmp_path / "v.safetensors")
    assert (loaded.digest, loaded.steps, loaded.facts["variants"]) == (digest, (0,), ["v0", "v1", "v2"])
    z = np.random.default_rng(0).normal(size=(5, WIDTH))
    np.testing.assert_array_equal(loaded.scorers[0].score(z), vaccine.scorers[0].score(z))
    assert not loaded.responses  # no answer was measured
    replace(vaccine, responses={1: vaccine.scorers[0]}).save(tmp_path / "later.safetensors")
    later = Vaccine.load(tmp_path / "later.safetensors")
    assert (set(later.scorers), set(later.responses)) == ({0}, {1})
    np.testing.assert_array_equal(later.responses[1].score(z), vaccine.scorers[0].score(z))
    loaded.check(BASE, PROBE)
    with pytest.raises(ProfileMismatch, match="made for base"):
        loaded.check("c" * 64, PROBE)
    with pytest.raises(ProfileMismatch, match="probe"):
        loaded.check(BASE, {**PROBE, "layers": 99})


def test_a_file_that_is_no_vaccine_is_refused(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "absent"):
        with pytest.raises(ProfileMismatch, match=name):
            Vaccine.load(tmp_path / name)


def test_a_vaccine_of_an_older_kind_is_refused(vaccine, tmp_path):
    about = {"format": "headguard.vaccine/1", "base": BASE, "probe": PROBE, "facts": {}}
    save_arrays(tmp_path / "old.safetensors", {"0/inner": np.zeros((1, 1, 1))}, about)
    with pytest.raises(ProfileMismatch, match="not a vaccine of format"):
        Vaccine.load(tmp_path / "old.safetensors")


def test_variants_that_hardly_fired_teach_nothing(pattern):
    with pytest.raises(CalibrationError, match="nothing to learn from"):
        fit_vaccine([variant(0, pattern, fired=10)[0]], base=BASE, probe=PROBE)


@pytest.mark.slow
def test_a_profile_carries_the_vaccinated_signal_only_where_the_vaccine_speaks(vaccine, key, clean, tmp_path):
    bare = fit_profile(clean, key, seed=1)
    assert "vaccinated" not in bare.signals
    path = tmp_path / "p.safetensors"
    fit_profile(clean, key, seed=1, vaccine=vaccine).save(path)
    profile = Profile.load(path, key)
    assert [("vaccinated" in point.fitted) for point in profile.checkpoints] == [
        point.step == 0 for point in profile.checkpoints
    ]
    assert set(profile.fused) == {"shift", "vaccinated", "response", "confidence", "certainty"}
    fresh = draw_measurement(np.random.default_rng(5), 300)
    detector = Detector(profile, "all", 0.05)
    p_values = detector.p_values(fresh)
    assert (p_values <= 0.05).mean() < 0.12
    alone = [v.p_value for v in detector.verdicts(fresh)]
    final = [p for p, v in zip(p_values, alone, strict=True) if v is not None]
    # Verdicts stop at the first flag; until then both are the same number.
    same = [abs(a - b) < 1e-12 for a, b in zip(final, alone, strict=True) if b > 0.05]
    assert all(same)


@pytest.mark.slow
def test_non_finite_requests_have_no_p_value(key, clean):
    profile = fit_profile(clean, key, seed=1)
    gram = clean.at[0].gram.clone()
    gram[0] = float("nan")
    broken = replace(clean, at={**clean.at, 0: replace(clean.at[0], gram=gram)})
    p_values = Detector(profile, "prefill", 0.05).p_values(broken)
    assert np.isnan(p_values[0])
    assert np.isfinite(p_values[1:]).all()
