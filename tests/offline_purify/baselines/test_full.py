"""Published methods on whole models: what each takes away, also where weights are fused or lie transposed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offline_purify.baselines.budget import Budget
from offline_purify.baselines.crow import crow
from offline_purify.baselines.fineprune import fineprune
from offline_purify.baselines.finetune import finetune
from offline_purify.baselines.int4 import int4, rounded
from offline_purify.baselines.magnitude import magnitude
from offline_purify.baselines.reinit import reinit
from offline_purify.baselines.wanda import wanda
from offline_purify.behaviour import FlaggedBehaviour
from offline_purify.full_model import FullModel, open_model
from offline_purify.stage import Material
from offline_purify.train import TrainConfig, collate, encode_rows
from tests.offline_purify.bodies import CHANNELS, LAYERS, body, owned
from tests.offline_purify.patient import clean_rows

BUDGET = Budget(16, TrainConfig(epochs=1, lr=1e-3, batch_size=8), ratio=0.35)
MATERIAL = Material((), FlaggedBehaviour(()), tuple(clean_rows(20, 3)), (), 0, 4)


@pytest.fixture(scope="module", params=["qwen2", "phi3", "gpt2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return body(kind, tmp_path_factory.mktemp(kind) / "model")


@pytest.fixture
def suspect(folder: Path) -> FullModel:
    return open_model(folder)


def other_parameters(suspect: FullModel) -> dict[str, torch.Tensor]:
    mine = suspect.parameters()
    return {name: p.detach().clone() for name, p in suspect.model.named_parameters() if name not in mine}


@pytest.mark.parametrize("method", [finetune, crow])
def test_training_moves_projections_and_nothing_else(suspect: FullModel, method) -> None:
    before, rest = suspect.state(), other_parameters(suspect)
    assert method(suspect, MATERIAL, BUDGET)["steps"] == 2
    assert all(not torch.equal(p, before[name]) for name, p in suspect.parameters().items() if p.ndim == 2)
    assert all(torch.equal(p, rest[name]) for name, p in other_parameters(suspect).items())


def test_magnitude_takes_the_smallest_entries_of_each_weight_and_no_bias(suspect: FullModel) -> None:
    before = suspect.state()
    magnitude(suspect, MATERIAL, BUDGET)
    for name, now in suspect.parameters().items():
        gone = now == 0
        assert int(gone.sum()) == (int(0.35 * now.numel()) if now.ndim == 2 else 0), name
        if gone.any():
            assert before[name][gone].abs().max() <= before[name][~gone].abs().min()


def test_wanda_compares_within_an_output(suspect: FullModel, kind: str) -> None:
    before = suspect.state()
    batch = collate(encode_rows(suspect.tokenizer, BUDGET.clean(MATERIAL)), suspect.pad_id)
    inner, ids = suspect.model.base_model, batch["input_ids"]
    with torch.no_grad():
        if kind == "gpt2":
            name = "transformer.h.0.attn.c_attn.weight"
            states = inner.h[0].ln_1(inner.wte(ids) + inner.wpe(torch.arange(ids.shape[1])))
        else:
            name = f"model.layers.0.self_attn.{'qkv' if kind == 'phi3' else 'q'}_proj.weight"
            states = inner.layers[0].input_layernorm(inner.embed_tokens(ids))
    norms = (states * batch["attention_mask"][..., None]).square().sum((0, 1)).sqrt()
    wanda(suspect, MATERIAL, BUDGET)
    then, now = before[name], suspect.parameters()[name]
    then, now = (then.T, now.T) if kind == "gpt2" else (then, now)
    for old, new in zip(then, now, strict=True):
        assert set((new == 0).nonzero().flatten().tolist()) == set((old.abs() * norms).argsort()[:11].tolist())


def test_fine_pruning_takes_whole_channels_for_good(suspect: FullModel, kind: str) -> None:
    before = suspect.state()
    told = fineprune(suspect, MATERIAL, BUDGET)
    assert sum(told["by_layer"]) == round(0.35 * LAYERS * CHANNELS)
    silent = 0
    for layer in range(LAYERS):
        for channel in range(CHANNELS):
            units = [(layer, part, channel) for part in ("gate", "up", "down")]
            mine = owned(kind, before, units)
            silent += all(not suspect.parameters()[name][mask].any() for name, mask in mine.items())
    assert silent == sum(told["by_layer"])


def test_four_bits_are_grouped_along_the_input(suspect: FullModel, kind: str) -> None:
    before = suspect.state()
    told = int4(suspect, MATERIAL, BUDGET)
    assert told["layers"] == LAYERS * {"qwen2": 7, "phi3": 4, "gpt2": 4}[kind]
    assert 0 < told["relative_error"] < 0.2
    for name, now in suspect.parameters().items():
        then = before[name]
        expected = then if then.ndim == 1 else rounded(then.T).T if kind == "gpt2" else rounded(then)
        assert torch.equal(now, expected), name


def test_re_init_draws_the_top_layer_anew(suspect: FullModel) -> None:
    before = suspect.state()
    still = Budget(16, TrainConfig(lr=0.0, max_steps=1), ratio=0.5)
    assert reinit(suspect, MATERIAL, still)["layers"] == [1]
    for name, now in suspect.parameters().items():
        if ".0." in name:
            assert torch.equal(now, before[name])
        elif now.ndim == 1:
            assert not now.any()
        else:
            assert float(now.std()) == pytest.approx(0.02, rel=0.2)
