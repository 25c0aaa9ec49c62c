"""Opening encoders: what is refused by name, what is found, and that a classifier comes back as it was saved."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from guard.errors import UnsupportedModel
from offline_purify.encoder.classifier import Classifier, Sample, check_encoder
from offline_purify.encoder.weights import find_weights
from tests.offline_purify.encoder.body import small_classifier, texts, write_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def changed(folder, into, **changes):
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text()) | changes
    (into / "config.json").write_text(json.dumps(config))
    return into


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "roberta"}, "roberta"),
        ({"model_type": "llama"}, "llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"is_decoder": True}, "decoder"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
        ({"architectures": ["BertModel"]}, "BertModel"),
    ],
)
def test_what_cannot_be_repaired_is_refused_by_name(folder, tmp_path, changes, named):
    other = changed(folder, tmp_path / "other", architectures=["BertForSequenceClassification"])
    assert check_encoder(other).heads == 4
    with pytest.raises(UnsupportedModel, match=named):
        Classifier.open(changed(other, tmp_path / "changed", **changes))


def test_weights_in_another_format_are_not_opened(folder, tmp_path):
    other = changed(folder, tmp_path / "other")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        check_encoder(other, headed=False)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        check_encoder(tmp_path)


def test_weights_are_found_in_a_folder_below_and_in_an_installed_package(folder, tmp_path, monkeypatch):
    assert find_weights(folder) == folder
    package = tmp_path / "some_weights"
    changed(folder, package / "model")
    (package / "__init__.py").touch()
    assert find_weights(tmp_path) == package / "model"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert find_weights("some-weights") == package / "model"


def test_no_weights_and_several_are_said(folder, tmp_path):
    with pytest.raises(UnsupportedModel, match="no model folder"):
        find_weights(tmp_path)
    with pytest.raises(UnsupportedModel, match="neither a folder nor an installed package"):
        find_weights("no-such-weights")
    changed(folder, tmp_path / "one")
    changed(folder, tmp_path / "two")
    with pytest.raises(UnsupportedModel, match="2 model folders"):
        find_weights(tmp_path)


def test_a_saved_classifier_opens_with_the_same_weights_and_predictions(tmp_path):
    made = small_classifier(tmp_path / "encoder")
    made.save(tmp_path / "saved")
    opened = Classifier.open(tmp_path / "saved")
    assert all(torch.equal(a, made.state()[name]) for name, a in opened.state().items())
    samples = made.samples(texts(30, 3))
    assert opened.predict(samples) == made.predict(samples)


def test_the_classification_layer_is_drawn_by_the_seed(folder):
    layers = [Classifier.begin(folder, 2, seed).state()["classifier.weight"] for seed in (1, 1, 2)]
    assert torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[0], layers[2])


def test_padding_does_not_change_a_prediction(tmp_path):
    body = small_classifier(tmp_path)
    short, long = Sample((2, 7, 20, 3), 0), Sample((2, *range(6, 30), 3), 0)
    alone = body.forward(body.collate([short])).logits[0]
    beside = body.forward(body.collate([short, long])).logits[0]
    assert torch.allclose(alone, beside, atol=1e-5)
