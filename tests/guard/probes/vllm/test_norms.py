"""Norms of watched tokens, whatever share of a forward's tokens they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guard.gram import HeadGrams
from guard.kernels.paged import PagedRows
from guard.probes.vllm.norms import Norms

LAYERS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 8


def rows_of(query: list[int], places: list[int]) -> PagedRows:
    one = np.ones(len(query), np.int32)
    return PagedRows(np.asarray(query, np.int32), np.asarray(places, np.int32), one, one, one[:, None])


def shown(norms: Norms, rows: PagedRows, tokens: int, layers: int = LAYERS) -> list[torch.Tensor]:
    """Looks at random vectors of so many tokens in so many layers; their log norms by layer, [T, 2 (H + H_kv)]."""
    expected = []
    for _ in range(layers):
        query, key, value, output = (torch.randn(tokens, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
        norms.look(rows, query, key, value, output)
        expected.append(torch.cat([part.norm(dim=-1).log() for part in (query, output, key, value)], dim=1))
    return expected


@pytest.mark.parametrize("tokens", [2, 5])
def test_each_place_gets_the_norms_of_its_tokens_in_every_layer(tokens: int) -> None:
    torch.manual_seed(tokens)
    bank = HeadGrams(3, LAYERS, HEADS, 8, kv_heads=KV_HEADS)
    norms = Norms(bank)
    expected = torch.stack(shown(norms, rows_of([1, 0], [2, 0]), tokens), dim=1)
    norms.finish()
    expected[1] += torch.stack(shown(norms, rows_of([1], [2]), tokens), dim=1)[1]
    norms.finish()
    torch.testing.assert_close(bank.norms[[0, 2]], expected[:2])
    assert not bank.norms[1].any()


def test_a_forward_of_which_a_layer_was_not_seen_adds_nothing() -> None:
    bank = HeadGrams(1, LAYERS, HEADS, 8, kv_heads=KV_HEADS)
    norms = Norms(bank)
    shown(norms, rows_of([0], [0]), 1, LAYERS - 1)
    norms.finish()
    assert not bank.norms.any()
    shown(norms, rows_of([0], [0]), 1)
    norms.finish()
    assert bank.norms.all()
    norms.finish()  # nothing was looked at since
