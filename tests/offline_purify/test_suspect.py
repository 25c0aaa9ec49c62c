"""What the clinic admits, and that saving, restoring and the reference do what they say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from guard.adapters import inspect_adapter
from guard.errors import AdapterRejected, UnsupportedModel
from offline_purify.suspect import Suspect, check_repairable
from tests.offline_purify.heads.body import small_suspect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("body")
    small_suspect(path)
    return path


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights .gptq"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "gpt_neox"}, "'gpt_neox'"),
    ],
)
def test_a_base_that_cannot_be_repaired_is_refused_by_name_from_its_config(tmp_path, folder, change, complaint):
    config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match=complaint):
        check_repairable(tmp_path)


def test_a_pickled_adapter_is_refused(tmp_path, folder):
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterRejected, match="pickled code"):
        Suspect.open(folder / "base", tmp_path)


def test_head_size_comes_from_the_configuration(folder):
    layout = check_repairable(folder / "base")
    assert (layout.layers, layout.heads, layout.kv_heads, layout.head_dim) == (2, 8, 4, 8)


def test_a_saved_suspect_is_an_admissible_adapter_with_the_inputs_configuration(tmp_path, folder):
    body = Suspect.open(folder / "base", folder / "adapter")
    body.save(tmp_path / "candidate")
    info = inspect_adapter(tmp_path / "candidate", folder / "base")
    assert info.rank == 4
    ours = load_file(tmp_path / "candidate" / "adapter_model.safetensors")
    theirs = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    config = (tmp_path / "candidate" / "adapter_config.json").read_bytes()
    assert config == (folder / "adapter" / "adapter_config.json").read_bytes()


def test_the_reference_is_the_base_alone_or_the_last_good_adapter(tmp_path, folder):
    body = Suspect.open(folder / "base", folder / "adapter")
    ids = torch.tensor([[1, 4, 7, 8, 5]])
    with torch.no_grad():
        sick = body.model(ids).logits
        with body.reference():
            base = body.model(ids).logits
        assert torch.equal(body.model(ids).logits, sick)
    assert not torch.allclose(sick, base)
    for p in body.parameters().values():
        p.data.mul_(0.5)
    body.save(tmp_path / "good")
    with torch.no_grad():
        good = body.model(ids).logits
        both = Suspect.open(folder / "base", folder / "adapter", reference=tmp_path / "good")
        with both.reference():
            assert torch.allclose(both.model(ids).logits, good, atol=1e-6)
        assert torch.allclose(both.model(ids).logits, sick, atol=1e-6)
