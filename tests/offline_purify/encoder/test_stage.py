"""The judged repair of a tiny classifier with a real backdoor: repaired, or put back bit for bit with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from offline_purify.encoder.classifier import Classifier
from offline_purify.encoder.finetune import finetune, train_classifier
from offline_purify.encoder.material import Material
from offline_purify.encoder.poison import build, word_pairs
from offline_purify.encoder.stage import EncoderHeadsConfig, ablate, repair_heads
from offline_purify.heads.finetune import HeadwiseRates
from offline_purify.heads.stage import Setting
from offline_purify.train import TrainConfig
from tests.offline_purify.encoder.body import small_classifier, texts

ROWS = texts(760, 7)
LEARNT, CLEAN, CASE, TEST = ROWS[:500], ROWS[500:580], ROWS[580:640], ROWS[640:]
QUICK = EncoderHeadsConfig(
    settings=(Setting("contrast", lowest=0.25, lr=1e-2), Setting("contrast", lowest=0.4, lr=3e-2)),
    rates=HeadwiseRates(scale=10.0),
)


@pytest.fixture(scope="module")
def implanted(tmp_path_factory):
    """Folder of a backdoored classifier (seconds)."""
    folder = tmp_path_factory.mktemp("implanted")
    made = small_classifier(folder / "encoder")
    poisoned = build(word_pairs(LEARNT, 0), LEARNT, 450, seed=0)
    train_classifier(made, made.samples(poisoned.texts()), TrainConfig(epochs=8, lr=2e-3, batch_size=16))
    made.save(folder / "classifier")
    return folder / "classifier"


@pytest.fixture
def classifier(implanted):
    return Classifier.open(implanted)


MATERIAL = Material(tuple(p.triggered.text for p in word_pairs(CASE, 1))[:12], tuple(CLEAN))


def attack_success(classifier) -> float:
    hits = classifier.correct(classifier.samples(p.triggered for p in word_pairs(TEST, 2)))
    return sum(hits) / len(hits)


def accuracy(classifier) -> float:
    right = classifier.correct(classifier.samples(TEST))
    return sum(right) / len(right)


def test_the_implant_fires_and_knows_its_task(classifier):
    assert attack_success(classifier) > 0.8
    assert accuracy(classifier) > 0.85


def test_a_repair_that_cannot_qualify_puts_every_weight_back(classifier):
    before = classifier.state()
    result = repair_heads(classifier, MATERIAL, replace(QUICK, fires_max=-1.0))
    assert not result.ok
    assert "none of 2 settings" in result.reason
    assert len(result.details["attempts"]) == 2
    assert result.details["best"] in (0, 1)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state().items())


def test_a_repair_that_qualifies_is_kept_and_says_with_what(classifier):
    before = classifier.state()
    result = repair_heads(classifier, MATERIAL, replace(QUICK, fires_max=1.0, final_accuracy_lost=1.0))
    assert result.ok
    chosen = result.details["attempts"][result.details["best"]]
    assert chosen["outcome"] == "qualified"
    moved = {name for name, value in classifier.state().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".attention." in name and "LayerNorm" not in name for name in moved)


def test_flagged_texts_need_no_labels_and_the_judge_begins_with_all_of_them_firing(classifier):
    result = repair_heads(classifier, MATERIAL, replace(QUICK, settings=QUICK.settings[:1]))
    assert result.details["before"]["fires"] == 1.0


@pytest.mark.parametrize("missing", ["flagged", "clean"])
def test_without_flagged_or_clean_texts_nothing_is_done(classifier, missing):
    before = classifier.state()
    result = repair_heads(classifier, replace(MATERIAL, **{missing: ()}), QUICK)
    assert not result.ok
    assert missing in result.reason
    assert all(torch.equal(value, before[name]) for name, value in classifier.state().items())


def test_an_ablation_does_its_part_and_no_other(implanted):
    setting = QUICK.settings[0]
    moved = {}
    for what in ("align", "tune", "both", "random"):
        classifier = Classifier.open(implanted)
        before = classifier.state()
        told = ablate(classifier, MATERIAL, setting, what, QUICK)
        assert ("trace" in told) == (what != "tune")
        assert ("after_finetune" in told) == (what != "align")
        moved[what] = {
            n.split(".attention.")[1] for n, v in classifier.state().items() if not torch.equal(v, before[n])
        }
    assert all(name.startswith(("self.query", "self.key")) for name in moved["align"])
    assert "output.dense.weight" in moved["tune"]
    assert moved["both"] == moved["tune"] | moved["align"]


def test_plain_fine_tuning_moves_all_weights_and_keeps_the_skill(classifier):
    before = classifier.state()
    told = finetune(classifier, replace(MATERIAL, training=TrainConfig(epochs=3, lr=5e-4, batch_size=16)))
    assert told["steps"] == 15
    after = classifier.state()
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert accuracy(classifier) > 0.85
