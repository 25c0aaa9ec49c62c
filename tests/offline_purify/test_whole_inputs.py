"""Whole models that no repair can start from are refused by name, before any work and without loading weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from guard.errors import AdapterRejected, GuardError, UnsupportedModel
from guard.rows import write_rows
from offline_purify import suspect, workflow
from offline_purify.purify import check_inputs
from offline_purify.spec import RepairSpec
from tests.offline_purify.bodies import adapted, body
from tests.offline_purify.patient import clean_rows, write_flags


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return body("llama", tmp_path / "model")


def spec(model: Path, tmp_path: Path, **changes: Any) -> RepairSpec:
    write_rows(tmp_path / "clean.json", clean_rows(30, 0))
    flags = write_flags(tmp_path / "flags.jsonl", clean_rows(4, 1))
    given = {"base": model, "flags": flags, "clean": tmp_path / "clean.json", "out": tmp_path / "out"}
    return RepairSpec.model_validate(given | changes)


def refused(asked: RepairSpec, error: type[GuardError], said: str) -> None:
    """By the check alone and by the durable repair, which then records nothing."""
    with pytest.raises(error, match=said):
        check_inputs(asked)
    database = asked.out.with_name("clinic.sqlite")
    with pytest.raises(error, match=said):
        workflow.run(asked, workflow.database_url(database))
    assert not database.exists()
    assert not asked.out.exists()


def configured(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def test_whole_models_with_and_without_a_reference_pass_and_no_weights_are_read(model, tmp_path, monkeypatch):
    other = body("llama", tmp_path / "other", 8)

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(suspect.AutoModelForCausalLM, "from_pretrained", loaded)
    check_inputs(spec(model, tmp_path))
    check_inputs(spec(model, tmp_path, reference=other))


def test_an_adapter_over_the_suspicious_model_may_be_its_reference(model, tmp_path):
    check_inputs(spec(model, tmp_path, reference=adapted(model, tmp_path / "adapter", "llama")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantised weights .awq"),
        ({"num_experts": 4}, "mixture of experts"),
        ({"model_type": "mixtral"}, "'mixtral'"),
    ],
)
def test_a_model_that_is_not_covered_is_refused(model, tmp_path, change, said):
    refused(spec(configured(model, **change), tmp_path), UnsupportedModel, said)


def test_missing_files_are_named(model, tmp_path):
    refused(spec(tmp_path / "nowhere", tmp_path), UnsupportedModel, "config.json cannot be read")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(spec(model, tmp_path), UnsupportedModel, "lacks model-00002-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    refused(spec(model, tmp_path), UnsupportedModel, "index.json cannot be read")
    (model / "model.safetensors.index.json").unlink()
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(spec(model, tmp_path), UnsupportedModel, "no tokenizer that can be read")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(spec(model, tmp_path), UnsupportedModel, r"expected config.json and \*.safetensors")


def test_a_reference_that_cannot_answer_for_the_model_is_refused(model, tmp_path):
    refused(spec(model, tmp_path, reference=tmp_path / "nowhere"), UnsupportedModel, "nowhere: config.json")
    twin = shutil.copytree(model, tmp_path / "twin")
    refused(spec(model, tmp_path, reference=twin), UnsupportedModel, "is the suspicious model itself")
    quantised = configured(body("llama", tmp_path / "q", 8), quantization_config={"quant_method": "gptq"})
    refused(spec(model, tmp_path, reference=quantised), UnsupportedModel, "quantised weights .gptq")
    other = body("llama", tmp_path / "other", 8)
    vocabulary = (other / "tokenizer.json").read_text(encoding="utf-8").replace('"repeat"', '"again"')
    (other / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    refused(spec(model, tmp_path, reference=other), UnsupportedModel, "another vocabulary")
    foreign = adapted(body("gpt2", tmp_path / "gpt2"), tmp_path / "adapter", "gpt2")
    refused(spec(model, tmp_path, reference=foreign), AdapterRejected, "another base")
