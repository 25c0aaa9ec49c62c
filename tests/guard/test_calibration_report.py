"""The calibration report: every plot is drawn, and the page says what the numbers say."""

import re

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from guard.calibration import fit_profile
from guard.calibration_report import roc, write_report
from tests.guard.conftest import draw_measurement

pytestmark = pytest.mark.slow


PNG = b"\x89PNG\r\n\x1a\n"
ALWAYS = {"similarity.png", "oddness.png", "uniform.png", "lengths.png"}


@pytest.fixture(scope="module")
def profile(clean, key):
    return fit_profile(clean, key, seed=1, facts={"prompts": "<drawn>"})


@pytest.fixture(scope="module")
def fresh():
    """80 clean requests and 40 triggered ones, none of which was calibrated on, and which is which."""
    return draw_measurement(np.random.default_rng(11), 120, triggered=40), np.arange(120) >= 80


def plots_of(page):
    """The plots that a page shows; each must be there."""
    shown = set(re.findall(r'<img src="([^"]+)"', page.read_text(encoding="utf-8")))
    assert all((page.parent / name).read_bytes().startswith(PNG) for name in shown)
    return shown


def test_a_profile_alone_gives_a_page_with_its_plots_and_the_alpha_it_supports(profile, tmp_path):
    page = write_report(profile, tmp_path / "report", alpha=0.02)
    text = page.read_text(encoding="utf-8")
    assert plots_of(page) == ALWAYS
    assert "Supported: at alpha = 0.02" in text
    assert "&lt;drawn&gt;" in text
    assert "Fresh requests" not in text
    assert not list(page.parent.glob("*.part"))


def test_an_alpha_that_is_not_supported_is_said_to_be_so(profile, tmp_path):
    text = write_report(profile, tmp_path, alpha=0.001, window="prefill").read_text(encoding="utf-8")
    assert '<p class="no">NOT supported' in text


def test_labelled_requests_add_a_roc_and_their_rates(profile, fresh, tmp_path):
    measurement, triggered = fresh
    page = write_report(profile, tmp_path, alpha=0.02, measurement=measurement, labels=triggered)
    text = page.read_text(encoding="utf-8")
    assert plots_of(page) == ALWAYS | {"roc.png"}
    hits = re.search(r"triggered requests flagged at alpha = 0.02</td><td>(\d+) of 40", text)
    assert int(hits[1]) >= 36
    assert "80 fresh clean requests" in text
    area = re.search(r"AUROC of fused</td><td>([\d.]+)", text)
    assert float(area[1]) > 0.95


def test_fresh_clean_requests_alone_are_tested_and_draw_no_roc(profile, tmp_path):
    measurement = draw_measurement(np.random.default_rng(12), 60)
    page = write_report(profile, tmp_path, alpha=0.02, measurement=measurement)
    assert plots_of(page) == ALWAYS
    pvalue = re.search(r"60 fresh clean requests</td><td>60</td><td>([\d.e-]+)", page.read_text(encoding="utf-8"))
    assert float(pvalue[1]) > 0.001


def test_labels_must_match_the_requests(profile, fresh, tmp_path):
    with pytest.raises(ValueError, match="3 labels for 120"):
        write_report(profile, tmp_path, measurement=fresh[0], labels=np.zeros(3, dtype=bool))


def test_the_area_under_the_roc_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    clean, triggered = rng.integers(0, 12, 90).astype(float), rng.integers(4, 15, 70).astype(float)
    false_alarms, hits, area = roc(clean, triggered)
    assert area == pytest.approx(mannwhitneyu(triggered, clean).statistic / (90 * 70))
    assert false_alarms[[0, -1]].tolist() == hits[[0, -1]].tolist() == [0.0, 1.0]
