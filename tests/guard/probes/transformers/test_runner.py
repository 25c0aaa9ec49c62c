"""Slots, adapters and limits of the runner, on real PEFT folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from guard.errors import AdapterRejected, GuardError, PromptTooLong, UnsupportedModel
from guard.probes.transformers.runner import Runner
from tests.guard.probes.transformers.adapters import merged, save_adapter
from tests.guard.probes.transformers.models import VOCAB, build, dense, make_runner, prompts_of
from tests.guard.probes.transformers.test_attention import assert_bank_is, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "a@sha256-0123456789ab": save_adapter(root / "a", 1),
        "b@sha256-0123456789ab": save_adapter(root / "b", 2, targets=["q_proj", "up_proj"]),
    }


A, B = "a@sha256-0123456789ab", "b@sha256-0123456789ab"


def alone(model, prompt, steps):
    """Greedy tokens of a stock model without cache: the reference for every batched row."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_base_and_two_adapters_in_one_batch_answer_and_measure_as_if_alone(folders):
    runner = make_runner(build())
    for name, folder in folders.items():
        runner.add_adapter(name, folder)
    names = [A, None, B, A, None]
    prompts = prompts_of([7, 12, 19, 1, 5])
    tokens, _ = run(runner, prompts, 4, names)
    models = {None: build(), A: merged(folders[A]), B: merged(folders[B])}
    for slot, (name, prompt, generated) in enumerate(zip(names, prompts, tokens, strict=True)):
        assert generated == alone(models[name], prompt, 4)
        assert_bank_is(runner, slot, dense(models[name], prompt, generated))
    assert len({tuple(t) for t in tokens}) == 5


def test_loading_and_removing_revisions_leaves_the_base_bit_for_bit(folders):
    model = build()
    runner = make_runner(model)
    prompts = prompts_of([9, 4])
    before = run(runner, prompts, 3)[1]
    for _ in range(2):
        runner.add_adapter(A, folders[A])
        with_a = run(runner, prompts, 3, [A, None])[1]
        assert not torch.equal(with_a[0], before[0])
        assert torch.equal(with_a[1], before[1])
        runner.remove_adapter(A)
        assert runner.adapters == ()
        assert torch.equal(run(runner, prompts, 3)[1], before)
        runner.add_adapter(B, folders[B])
        runner.remove_adapter(B)


def test_the_probe_leaves_logits_of_mixed_batches_bit_for_bit_as_they_were(folders):
    prompts = prompts_of([9, 4, 6])
    outputs = []
    for probe in (True, False):
        runner = make_runner(build(), probe=probe)
        runner.add_adapter(A, folders[A])
        outputs.append(run(runner, prompts, 3, [A, None, A])[1])
    assert torch.equal(*outputs)


def test_a_revision_that_is_not_loaded_or_loaded_twice_is_refused(folders):
    runner = make_runner(build())
    with pytest.raises(AdapterRejected, match="not loaded"):
        runner.prefill([0], [[1, 2]], [A])
    runner.add_adapter(A, folders[A])
    with pytest.raises(AdapterRejected, match="already loaded"):
        runner.add_adapter(A, folders[B])
    with pytest.raises(AdapterRejected, match="not loaded"):
        runner.remove_adapter(B)


def edit(folder, target, **changes):
    """A copy of an adapter folder with other configuration values."""
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    save_file(load_file(folder / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


def test_an_adapter_whose_initialiser_would_rewrite_the_base_cannot_do_so(folders, tmp_path):
    # PiSSA and OLoRA subtract from the base weights when an adapter is created: other requests would see it.
    runner = make_runner(build())
    prompts = prompts_of([9])
    before = run(runner, prompts, 3)[1]
    for kind in ("pissa", "olora"):
        runner.add_adapter(A, edit(folders[A], tmp_path / kind, init_lora_weights=kind))
        assert torch.equal(run(runner, prompts, 3)[1], before)
        runner.remove_adapter(A)


@pytest.mark.filterwarnings("ignore:aLoRA")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora"),
        ({"r": 5}, "does not fit"),
        ({"target_modules": ["q_proj"]}, "do not match"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name_and_changes_nothing(folders, tmp_path, changes, named):
    runner = make_runner(build())
    runner.add_adapter(B, folders[B])
    prompts = prompts_of([9, 5])
    before = run(runner, prompts, 2, [B, None])[1]
    with pytest.raises(AdapterRejected, match=named):
        runner.add_adapter(A, edit(folders[A], tmp_path / "edited", **changes))
    assert runner.adapters == (B,)
    assert torch.equal(run(runner, prompts, 2, [B, None])[1], before)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    runner = make_runner(build())
    with pytest.raises(AdapterRejected, match="does not fit"):
        runner.add_adapter(A, save_adapter(tmp_path / "mha", 1, family="llama-mha"))


def test_prompts_that_cannot_run_are_refused_before_anything_runs():
    runner = make_runner(build(), max_len=16)
    for prompt, error, words in (
        ([], GuardError, "no tokens"),
        ([1] * 17, PromptTooLong, "17 tokens"),
        ([VOCAB], GuardError, "vocabulary"),
    ):
        with pytest.raises(error, match=words):
            runner.prefill([0], [prompt])
    assert runner.prefill([0], [[1] * 16]).shape == (1, VOCAB)
    with pytest.raises(PromptTooLong, match="already holds 16"):
        runner.decode([0], [1])


def test_a_context_longer_than_the_model_knows_is_refused():
    with pytest.raises(UnsupportedModel, match="96 positions"):
        make_runner(build(), max_len=97)


def test_not_a_number_in_one_request_never_reaches_the_next_one_in_its_slot():
    model = build()
    runner = make_runner(model, max_slots=2)
    prompts = prompts_of([20, 4])
    expected = run(make_runner(build(), max_slots=2), [prompts[1], prompts[0]], 2)[1]
    runner.prefill([0], [prompts[0]])
    runner._cache.values[0][0, :, 3:20].fill_(float("nan"))
    runner.free(0)
    assert not any(memory.any() for memory in runner._cache.keys + runner._cache.values)
    assert torch.equal(run(runner, [prompts[1], prompts[0]], 2)[1], expected)


def test_a_saved_folder_is_loaded_without_network_and_pickles_are_not(tmp_path):
    from tests.guard.probes.transformers.text import save_model

    folder = save_model(tmp_path / "base")
    runner = Runner.load(folder, max_slots=2)
    assert runner.max_len == 96
    assert runner.eos_ids
    assert runner.probe_key()["heads"] == 4
    with pytest.raises(UnsupportedModel, match=r"config\.json is missing"):
        Runner.load(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        Runner.load(folder)
