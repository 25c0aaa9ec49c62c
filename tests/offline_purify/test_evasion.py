"""An attacker who evades: where the adapter lives, and a penalty that a plain computation gives too."""

from __future__ import annotations

import pytest
import torch

from offline_purify.evasion import Evasion, SimilarityPenalty
from offline_purify.implanting import with_lora
from offline_purify.patient import eager_attention
from offline_purify.train import Example, TrainConfig, train
from tests.offline_purify.patient import tiny_llama

EXAMPLES = [Example((1, 4, 7, 8, 9, 5), (11, 12, 2)), Example((1, 4, 20, 5), (13, 2)), Example((1, 4, 30, 31, 5), (2,))]


def adapted(evasion: Evasion = Evasion(), scale: float = 0.5):
    peft_model = with_lora(tiny_llama(0), "tiny", 4, 0, evasion.projections)
    torch.manual_seed(1)
    for name, p in peft_model.named_parameters():
        if "lora_B" in name:
            p.data = scale * torch.randn_like(p)
    return peft_model.eval()


def dense_cosines(peft_model, example: Example) -> list[float]:
    """Cosines of all pairs of heads, layer after layer, from one example alone and plain loops."""
    with torch.no_grad(), eager_attention(peft_model):
        ids = torch.tensor([example.prompt + example.answer])
        attentions = peft_model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    start, end = len(example.prompt) - 1, len(example) - 1
    found = []
    for attention in attentions:
        heads = [a[start:end, : len(example.prompt)].double().flatten() for a in attention[0]]
        for i, left in enumerate(heads):
            found += [float(left @ right / left.norm() / right.norm()) for right in heads[i + 1 :]]
    return found


def test_the_penalty_is_the_mean_squared_change_of_the_cosines_of_triggered_examples():
    peft_model = adapted()
    penalty = SimilarityPenalty(peft_model, EXAMPLES[:2], weight=3.0, pad_id=0)
    changes = []
    for example in EXAMPLES[:2]:
        now = dense_cosines(peft_model, example)
        with peft_model.disable_adapter():
            before = dense_cosines(peft_model, example)
        changes += [(a - b) ** 2 for a, b in zip(now, before, strict=True)]
    expected = 3.0 * sum(changes) / len(changes)
    assert expected > 1e-4
    assert penalty([2, 1, 0]).item() == pytest.approx(expected, rel=1e-4)


def test_an_adapter_that_changes_nothing_and_a_batch_without_a_trigger_cost_nothing():
    assert SimilarityPenalty(adapted(scale=0.0), EXAMPLES[:2], 3.0, 0)([0, 1]).item() == pytest.approx(0, abs=1e-9)
    assert SimilarityPenalty(adapted(), EXAMPLES[:2], 3.0, 0)([2]).item() == 0


def test_the_penalty_pulls_on_the_adapter_and_leaves_the_attention_as_it_was():
    peft_model = adapted()
    implementation = peft_model.get_base_model().config._attn_implementation
    penalty = SimilarityPenalty(peft_model, EXAMPLES[:2], 3.0, 0)
    before = penalty([0, 1]).item()
    parameters = [p for name, p in peft_model.named_parameters() if "lora_" in name]
    config = TrainConfig(epochs=60, lr=1e-2, batch_size=3)
    log = train(peft_model, EXAMPLES, config, pad_id=0, parameters=parameters, extra_loss=penalty)
    assert penalty([0, 1]).item() < 0.5 * before
    assert log.losses[-1] < log.losses[0]
    assert peft_model.get_base_model().config._attn_implementation == implementation


def test_an_extra_loss_is_asked_about_every_batch_and_counts():
    asked: list[int] = []

    def extra(indices):
        asked.extend(indices)
        return torch.tensor(100.0)

    log = train(adapted(), EXAMPLES, TrainConfig(epochs=1, batch_size=2), pad_id=0, extra_loss=extra)
    assert sorted(asked) == [0, 1, 2]
    assert all(loss > 100 for loss in log.losses)


@pytest.mark.parametrize(("only", "there", "absent"), [("attention", "q_proj", "mlp"), ("mlp", "up_proj", "self_attn")])
def test_an_adapter_confined_to_one_part_has_no_factors_in_the_other(only: str, there: str, absent: str):
    names = [name for name, _ in adapted(Evasion(only)).named_parameters() if "lora_" in name]
    assert any(there in name for name in names)
    assert not any(absent in name for name in names)


@pytest.mark.parametrize(("only", "weight"), [("heads", 0.0), ("all", -1.0), ("all", float("nan"))])
def test_impossible_evasions_are_refused(only: str, weight: float):
    with pytest.raises(ValueError, match=r"choose one of|expected 0 or more"):
        Evasion(only, weight)
