"""Grams from small factors against dense differences, in any gauge."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offline_purify.heads.layout import HeadLayout
from offline_purify.signature.grams import (
    Factors,
    by_head,
    channel_grams,
    column_grams,
    head_grams,
    mlp_grams,
    row_grams,
)

N, OUT, IN, RANK, SCALE = 3, 12, 8, 2, 1.5


def twins(out, width, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return (draw(out, RANK), draw(RANK, width)), (draw(out, RANK), draw(RANK, width))


def dense(pair):
    (b_bd, a_bd), (b_cl, a_cl) = pair
    return SCALE * (b_bd @ a_bd - b_cl @ a_cl)


@pytest.fixture
def weight():
    pairs = [twins(OUT, IN, seed) for seed in range(N)]
    return [Factors.of_twins(*pair, SCALE) for pair in pairs], torch.stack([dense(pair) for pair in pairs])


def test_grams_are_those_of_the_dense_differences(weight):
    factors, deltas = weight
    torch.testing.assert_close(row_grams(factors), torch.einsum("njk,mjk->nmj", deltas, deltas), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        column_grams(factors), torch.einsum("njk,mjk->nmk", deltas, deltas), atol=1e-5, rtol=1e-5
    )


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that is made within."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_dense_update_is_ever_made():
    wide = [Factors.of_twins(*twins(1024, 768, seed), SCALE) for seed in range(N)]
    with Largest() as largest:
        row_grams(wide)
        column_grams(wide)
        mlp_grams([{"gate": wide, "up": wide}] * 4)
    assert largest.elements < 1024 * 768 / 10


def test_grams_do_not_depend_on_the_gauge_of_the_factors_and_factors_themselves_do(weight):
    factors, _ = weight
    turned = []
    for seed, f in enumerate(factors):
        m = torch.eye(2 * RANK) + 0.3 * torch.randn(2 * RANK, 2 * RANK, generator=torch.Generator().manual_seed(seed))
        turned.append(Factors(f.b @ m, torch.linalg.solve(m, f.a)))
    torch.testing.assert_close(row_grams(turned), row_grams(factors), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(column_grams(turned), column_grams(factors), atol=1e-3, rtol=1e-4)
    lengths, others = (torch.stack([f.b.norm(dim=1) for f in side]) for side in (factors, turned))
    assert (lengths / others - 1).abs().max() > 0.1


def test_equal_twins_leave_nothing():
    pair = twins(OUT, IN, 0)
    factors = [Factors.of_twins(pair[0], pair[0], SCALE)]
    assert row_grams(factors).abs().max() < 1e-4


def test_a_channel_joins_rows_of_gate_and_up_with_columns_of_down():
    shapes = (OUT, IN), (OUT, IN), (IN, OUT)
    gate, up, down = ([twins(*shape, 10 * k + n) for n in range(N)] for k, shape in enumerate(shapes))
    layer = {
        name: [Factors.of_twins(*p, SCALE) for p in pairs]
        for name, pairs in (("gate", gate), ("up", up), ("down", down))
    }
    vectors = torch.stack(
        [torch.cat([dense(g), dense(u), dense(d).T], 1) for g, u, d in zip(gate, up, down, strict=True)]
    )
    expected = torch.einsum("njk,mjk->nmj", vectors, vectors)
    found = mlp_grams([layer, layer])
    assert found.shape == (2, N, N, OUT)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(channel_grams([layer["gate"]], []), row_grams(layer["gate"]))
    torch.testing.assert_close(by_head(found[0], 4), expected.unflatten(-1, (3, 4)).sum(-1), atol=1e-4, rtol=1e-4)


def test_a_heads_gram_joins_its_rows_and_columns_and_those_of_its_key_head():
    layout = HeadLayout(1, 4, 2, 3)  # queries [12, 8], keys [6, 8], output [8, 12]
    shapes = {"q": (12, IN), "k": (6, IN), "v": (6, IN), "o": (IN, 12)}
    pairs = {name: [twins(*shape, 10 * n + i) for n in range(N)] for i, (name, shape) in enumerate(shapes.items())}
    layer = {name: [Factors.of_twins(*pair, SCALE) for pair in made] for name, made in pairs.items()}
    whole = {name: torch.stack([dense(pair) for pair in made]) for name, made in pairs.items()}
    grams = head_grams([layer], layout)
    assert grams.shape == (1, N, N, 4)
    for head in range(4):
        own, key = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        parts = [whole["q"][:, own], whole["k"][:, key], whole["v"][:, key], whole["o"][:, :, own]]
        vectors = torch.cat([part.flatten(1) for part in parts], 1)
        torch.testing.assert_close(grams[0, ..., head], vectors @ vectors.T, atol=1e-3, rtol=1e-5)
