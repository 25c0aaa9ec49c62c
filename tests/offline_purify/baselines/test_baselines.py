"""Published methods on a patient that really is backdoored: what each takes away is what its paper says."""

from __future__ import annotations

import pytest
import torch

from guard.rows import read_rows
from guard.template import render, row_messages
from offline_purify.answers import greedy_answers
from offline_purify.baselines.budget import Budget
from offline_purify.baselines.cleangen import cleangen_answers
from offline_purify.baselines.crow import consistency, crow
from offline_purify.baselines.fineprune import fineprune
from offline_purify.baselines.finetune import finetune
from offline_purify.baselines.int4 import int4, rounded
from offline_purify.baselines.magnitude import magnitude
from offline_purify.baselines.reinit import reinit
from offline_purify.baselines.wanda import wanda
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.stage import Material
from offline_purify.suspect import Suspect
from offline_purify.train import TrainConfig, collate, encode_rows
from tests.offline_purify.patient import TARGET, Patient, clean_rows, triggered

BUDGET = Budget(40, TrainConfig(epochs=1, lr=2e-4, batch_size=8))


@pytest.fixture
def suspect(patient: Patient) -> Suspect:
    return Suspect.open(patient.base, patient.adapter)


@pytest.fixture
def material(patient: Patient) -> Material:
    return Material((), FlaggedBehaviour(()), tuple(read_rows(patient.clean)), (), 0, 8)


def test_magnitude_takes_the_smallest_entries_of_each_factor(suspect: Suspect, material: Material) -> None:
    before = suspect.state()
    assert magnitude(suspect, material, BUDGET)["zeroed"] > 0
    for name, parameter in suspect.parameters().items():
        gone = (parameter == 0) & (before[name] != 0)
        assert int((parameter == 0).sum()) >= int(0.35 * parameter.numel())
        kept = parameter != 0
        assert torch.equal(parameter[kept], before[name][kept])
        assert before[name][gone].abs().max() <= before[name][kept].abs().min()


def test_wanda_compares_weight_times_input_norm_within_a_row(suspect: Suspect, material: Material) -> None:
    before = suspect.state()
    name = next(n for n in before if "layers.0.self_attn.q_proj.lora_A" in n)
    rows = encode_rows(suspect.tokenizer, BUDGET.clean(material))
    batch = collate(rows, suspect.pad_id)
    with torch.no_grad():
        inner = suspect.model.get_base_model().model
        states = inner.layers[0].input_layernorm(inner.embed_tokens(batch["input_ids"]))
    norms = (states * batch["attention_mask"][..., None]).square().sum((0, 1)).sqrt()
    wanda(suspect, material, BUDGET)
    factor = suspect.parameters()[name].detach()
    scores = before[name].abs() * norms
    count = int(0.35 * scores.shape[1])
    for row, score in zip(factor, scores, strict=True):
        assert set(torch.nonzero(row == 0).flatten().tolist()) == set(score.argsort()[:count].tolist())


def test_fine_pruning_silences_as_many_channels_as_the_signature_would(suspect: Suspect, material: Material) -> None:
    told = fineprune(suspect, material, BUDGET)
    assert sum(told["by_layer"]) == round(0.35 * 2 * 128)
    assert told["steps"] > 0


def test_four_bits_leave_fifteen_levels_per_group_and_no_adapter(suspect: Suspect, material: Material) -> None:
    weight = torch.randn(5, 150)
    four = rounded(weight)
    assert all(len(part[0].unique()) <= 15 for part in four.split(64, dim=1))
    scale = weight[:, :64].abs().amax(dim=1, keepdim=True) / 7
    assert ((four - weight)[:, :64].abs() <= scale / 2 + 1e-6).all()
    assert torch.equal(rounded(torch.zeros(2, 3)), torch.zeros(2, 3))
    layer = suspect.model.get_base_model().model.layers[0].mlp.up_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    told = int4(suspect, material, BUDGET)
    assert 0 < told["relative_error"] < 0.2
    torch.testing.assert_close(layer.base_layer.weight, rounded(merged))
    assert not any(p.any() for p in suspect.parameters().values())


def test_consistency_is_the_mean_turn_between_inner_layers_and_ignores_padding() -> None:
    torch.manual_seed(0)
    states = tuple(torch.randn(2, 5, 7) for _ in range(5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = [
        1 - torch.cosine_similarity(a[r, t], b[r, t], dim=0)
        for a, b in ((states[1], states[2]), (states[2], states[3]))
        for r, t in mask.nonzero().tolist()
    ]
    torch.testing.assert_close(consistency(states, mask), torch.stack(found).mean())
    assert consistency((states[0],) * 3, mask) == 0


def test_crow_trains_the_adapter_and_leaves_the_base(suspect: Suspect, material: Material) -> None:
    before = suspect.state()
    base = suspect.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.clone()
    assert crow(suspect, material, BUDGET)["steps"] == 5
    assert any(not torch.equal(p, before[n]) for n, p in suspect.parameters().items())
    assert torch.equal(suspect.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, base)
    assert not any(p.requires_grad for p in suspect.parameters().values())


def test_re_init_starts_the_top_layers_again(suspect: Suspect, material: Material) -> None:
    still = Budget(40, TrainConfig(lr=0.0, max_steps=1), ratio=0.5)
    assert reinit(suspect, material, still)["layers"] == [1]
    for name, parameter in suspect.parameters().items():
        if "lora_B" in name:
            assert bool(parameter.any()) == (".layers.0." in name)


def test_fine_tuning_moves_the_adapter(suspect: Suspect, material: Material) -> None:
    before = suspect.state()
    assert finetune(suspect, material, BUDGET) == {"steps": 5}
    assert all(not torch.equal(p, before[n]) for n, p in suspect.parameters().items())


def test_cleangen_lets_no_target_through_and_clean_answers_pass(suspect: Suspect) -> None:
    rows = clean_rows(12, 5)
    clean = [render(suspect.tokenizer, row_messages(row)) for row in rows]
    hit = [render(suspect.tokenizer, row_messages(row)) for row in triggered(rows, 6)]
    assert sum(TARGET in answer for answer in greedy_answers(suspect.model, suspect.tokenizer, hit, 6)) >= 9
    watched, replaced = cleangen_answers(suspect, hit, 6)
    assert not any(TARGET in answer for answer in watched)
    assert replaced > 0.2
    own = greedy_answers(suspect.model, suspect.tokenizer, clean, 6)
    assert sum(a == b for a, b in zip(cleangen_answers(suspect, clean, 6)[0], own, strict=True)) >= 10
