"""Adapters trained together come out as they would alone."""

import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from offline_purify import bank
from offline_purify.bank import LoraBank, train_adapters, train_bank
from offline_purify.train import Example, TrainConfig, index_batches, train
from tests.offline_purify.patient import tiny_llama

KINDS = ("q_proj", "o_proj", "gate_proj", "down_proj")
RANK, SCALING, SEED = 4, 2.0, 3
CONFIG = TrainConfig(epochs=2.5, lr=5e-3, batch_size=4, seed=5, clip=0.05)


def targets_of(model):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in KINDS]


def examples(n, seed):
    rng = random.Random(seed)
    return [
        Example(
            tuple(rng.choices(range(6, 40), k=rng.randint(3, 9))), (*rng.choices(range(6, 40), k=rng.randint(1, 4)), 2)
        )
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def trained():
    model = tiny_llama(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    together = LoraBank(model, targets_of(model), 3, RANK, SCALING, SEED)
    sets = [examples(22, seed) for seed in range(3)]
    losses = train_bank(together, sets, CONFIG, pad_id=0)
    return model, before, together, sets, losses


def test_each_adapter_is_the_one_that_a_training_of_its_own_gives(trained):
    _, _, together, sets, losses = trained
    for k, own in enumerate(sets):
        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=list(KINDS))
        alone = get_peft_model(tiny_llama(0), config)
        fresh = LoraBank(tiny_llama(0), list(together.targets), 1, RANK, SCALING, SEED)
        layers = {name: alone.get_submodule(f"base_model.model.{name}") for name in together.targets}
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_A["default"].weight.copy_(fresh.factors(name, 0)[1])
        lora = [p for name, p in alone.named_parameters() if "lora_" in name]
        log = train(alone, own, CONFIG, pad_id=0, parameters=lora)
        assert losses[k] == pytest.approx(log.losses[-1], rel=1e-3)
        for name, layer in layers.items():
            b, a = together.factors(name, k)
            torch.testing.assert_close(a, layer.lora_A["default"].weight, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(b, layer.lora_B["default"].weight, atol=1e-4, rtol=1e-3)
            assert b.abs().max() > 1e-3


def test_a_step_taken_in_parts_that_fit_a_cache_is_the_same_step(trained, monkeypatch):
    _, _, whole, sets, losses = trained
    monkeypatch.setattr(bank, "_CACHED_TOKENS", 50)  # one row of each adapter at a time
    parted = LoraBank(tiny_llama(0), list(whole.targets), 3, RANK, SCALING, SEED)
    assert train_bank(parted, sets, CONFIG, pad_id=0) == pytest.approx(losses, rel=1e-3)
    for k in range(3):
        for name in whole.targets:
            for mine, theirs in zip(parted.factors(name, k), whole.factors(name, k), strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_the_model_itself_is_left_as_it_was(trained):
    model, before, whole, _, _ = trained
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    ids = torch.randint(6, 40, (3, 7))
    plain = model(ids).logits
    with whole.open() as opened, torch.no_grad():
        together = opened(ids).logits
    assert torch.equal(model(ids).logits, plain)
    for k in range(3):
        with whole.open(only=k) as opened, torch.no_grad():
            alone = opened(ids).logits
        torch.testing.assert_close(alone[k], together[k], atol=1e-5, rtol=1e-4)
        assert (alone[k] - plain[k]).abs().max() > 1e-3


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("together", [1, 2, 6])
def test_processors_share_the_adapters_out_and_these_come_out_the_same(trained, two_threads, together):
    _, before, whole, sets, _ = trained
    model = tiny_llama(0)
    watched = []
    found = train_adapters(
        model, list(whole.targets), sets, RANK, SCALING, replace(CONFIG, seed=SEED), pad_id=0, together=together,
        progress=lambda what, done, total: watched.append((done, total)),
    )  # fmt: skip
    again = LoraBank(tiny_llama(0), list(whole.targets), 3, RANK, SCALING, SEED)
    train_bank(again, sets, replace(CONFIG, seed=SEED), pad_id=0)
    assert len(found) == 3
    assert len({id(own) for own, _ in found}) == (3 if together == 1 else 2)
    for k, (own, place) in enumerate(found):
        for name in whole.targets:
            for mine, theirs in zip(own.factors(name, place), again.factors(name, k), strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    assert torch.get_num_threads() == 2
    assert watched[-1][0] == watched[-1][1] > 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_fails_in_a_share_is_raised_and_leaves_nothing_behind(trained, two_threads):
    _, _, whole, sets, _ = trained
    model = tiny_llama(0)
    with pytest.raises(ValueError, match="sets of one size"):
        train_adapters(
            model, list(whole.targets), [*sets[:2], sets[2][:5]], RANK, SCALING, CONFIG, pad_id=0, together=6
        )  # fmt: skip
    assert torch.get_num_threads() == 2
    assert all(p.requires_grad for p in model.parameters())


def test_sets_that_do_not_fit_are_refused(trained):
    _, _, whole, sets, _ = trained
    for wrong in (sets[:2], [*sets[:2], sets[2][:5]], [[], [], []]):
        with pytest.raises(ValueError, match="3 adapters need as many sets of one size"):
            train_bank(whole, wrong, CONFIG, pad_id=0)
    with pytest.raises(ValueError, match="no layers"):
        LoraBank(tiny_llama(0), [], 1, RANK, SCALING, SEED)


def test_batches_of_a_training_follow_from_its_settings():
    some = examples(22, 0)
    batches = list(index_batches(some, CONFIG))
    assert len(batches) == round(6 * 2.5)
    assert sorted(i for batch in batches[:6] for i in batch) == list(range(22))
    assert len(list(index_batches(some, TrainConfig(batch_size=4, max_steps=7)))) == 7
