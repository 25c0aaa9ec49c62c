"""Admission of adapters: every defect is refused by name, from the files alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from guard.adapters import BASE_DIGEST_KEY, inspect_adapter, stamp_base_digest
from guard.errors import AdapterRejected
from guard.identity import adapter_digest, base_digest, check_name, parse_revision, revision_name
from tests.guard.probes.transformers.adapters import TARGETS, save_adapter
from tests.guard.probes.transformers.text import save_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), family="llama-gqa")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"), seed=0)


@pytest.fixture
def adapter(original, tmp_path):
    return shutil.copytree(original, tmp_path / "adapter")


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change, metadata=None):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata=metadata or {"format": "pt"})


def test_a_sound_adapter_is_described(adapter, base):
    info = inspect_adapter(adapter, base)
    assert (info.rank, info.alpha, info.target_modules) == (4, 8.0, tuple(sorted(TARGETS)))
    assert info.parameters == sum(t.numel() for t in load_file(adapter / WEIGHTS).values())
    assert (info.digest, info.base_digest) == (adapter_digest(adapter), base_digest(base))


@pytest.mark.parametrize("name", ["adapter_model.bin", "extra.pt", "optimizer.pkl", "x.ckpt"])
def test_pickle_files_are_refused_even_beside_good_ones(adapter, base, name):
    (adapter / name).write_bytes(b"\x80\x04")
    with pytest.raises(AdapterRejected, match="safetensors only"):
        inspect_adapter(adapter, base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(adapter, base, bad):
    def spoil(tensors):
        next(iter(tensors.values()))[0, 0] = bad
        return tensors

    edit_weights(adapter, spoil)
    with pytest.raises(AdapterRejected, match="NaN or infinite"):
        inspect_adapter(adapter, base)


def test_an_adapter_of_a_base_of_other_shape_is_refused(adapter, base):
    edit_weights(adapter, lambda tensors: {n: torch.cat([t, t], dim=1) for n, t in tensors.items()})
    with pytest.raises(AdapterRejected, match="another base"):
        inspect_adapter(adapter, base)


def test_an_adapter_that_changes_modules_the_base_lacks_is_refused(adapter, base):
    edit_weights(adapter, lambda tensors: {n.replace("layers.0", "layers.77"): t for n, t in tensors.items()})
    with pytest.raises(AdapterRejected, match="does not have"):
        inspect_adapter(adapter, base)


def test_an_adapter_stamped_for_another_base_of_the_same_shape_is_refused(adapter, base):
    edit_weights(adapter, lambda tensors: tensors, {"format": "pt", BASE_DIGEST_KEY: "0" * 64})
    with pytest.raises(AdapterRejected, match="another base"):
        inspect_adapter(adapter, base)


def test_an_adapter_that_names_another_base_on_this_disk_is_refused(adapter, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    edit_config(adapter, base_model_name_or_path=str(other))
    inspect_adapter(adapter, base)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "initializer_range": 0.5}))
    with pytest.raises(AdapterRejected, match="another base"):
        inspect_adapter(adapter, base)


def test_stamping_keeps_the_tensors_and_makes_the_base_known(adapter, base):
    before = load_file(adapter / WEIGHTS)
    stamp_base_digest(adapter, base)
    after = load_file(adapter / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    inspect_adapter(adapter, base)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "rank"),
    ],
)
def test_kinds_of_adapter_that_are_not_supported_are_named(adapter, base, change, told):
    edit_config(adapter, **change)
    with pytest.raises(AdapterRejected, match=told):
        inspect_adapter(adapter, base)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_missing_and_unreadable_files_are_refused(adapter, base, name):
    (adapter / name).write_bytes(b"not this")
    with pytest.raises(AdapterRejected, match=name):
        inspect_adapter(adapter, base)
    (adapter / name).unlink()
    with pytest.raises(AdapterRejected, match=name):
        inspect_adapter(adapter, base)


@pytest.mark.parametrize("name", ["../etc", "a/b", "", ".", "A", "a" * 64, "a@b", "a b", "-a", "a\n", "a.b"])
def test_names_that_could_leave_their_folder_or_confuse_are_refused(name):
    with pytest.raises(AdapterRejected):
        check_name(name)


def test_revision_names_come_apart_as_they_were_put_together():
    assert parse_revision(revision_name("my-lora", "ab" * 32)) == ("my-lora", "ab" * 6)
    with pytest.raises(AdapterRejected):
        parse_revision("my-lora@sha256-xyz")
