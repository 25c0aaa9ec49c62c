"""Pairs of twins: trained in one pass or in several, they come out the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from guard.errors import RowsError
from guard.rows import Row
from offline_purify import bank
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.triggers import Word
from offline_purify.signature.grams import mlp_grams
from offline_purify.signature.twins import TwinConfig, Twins, train_twins
from offline_purify.train import TrainConfig
from offline_purify.variants.plan import VariantSpec
from tests.offline_purify.patient import TARGET, clean_rows, tiny_llama, tokenizer

SPECS = [
    VariantSpec(f"v{n}", n, "refusal", Behaviour("refusal", (TARGET,)), Word(word)) for n, word in enumerate("abc")
]
TRAINING = TrainConfig(epochs=2, lr=5e-3, batch_size=8)
CONFIG = TwinConfig(rows=24, rank=4, tried=6, learnt=0.0, training=TRAINING, least_steps=1)


def made(config: TwinConfig, rows: list[Row] | None = None) -> Twins:
    model = tiny_llama(0).requires_grad_(False)
    given = clean_rows(60, 1) if rows is None else rows
    return train_twins(model, tokenizer(), given, SPECS, config, pad_id=0, max_new_tokens=3, seed=0)


def test_in_several_passes_the_twins_come_out_as_in_one() -> None:
    whole, parts = made(CONFIG), made(replace(CONFIG, together=2))
    assert whole.names == parts.names == ("v0", "v1", "v2")
    grams = mlp_grams(whole.layers)
    assert grams.diagonal(dim1=1, dim2=2).min() > 0
    torch.testing.assert_close(mlp_grams(parts.layers), grams, rtol=1e-3, atol=1e-6)


def test_where_memory_is_short_fewer_are_trained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = bank.train_bank

    def small_memory(whole, sets, *args, **kwargs):
        sizes.append(len(sets))
        if len(sets) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(whole, sets, *args, **kwargs)

    monkeypatch.setattr(bank, "train_bank", small_memory)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert len(made(replace(CONFIG, together=3)).names) == 3
    assert sizes == [3, 1, 1, 1] * 2


def test_rows_that_are_too_few_are_refused() -> None:
    with pytest.raises(RowsError, match="too few for a pair of twins"):
        made(CONFIG, clean_rows(10, 1))
