"""The features of one request at one checkpoint that multivariate signals are made of.

None of them needs the attention rows themselves. Three families come from the head Gram and the sink: how alike heads
look (arctanh cosine of each pair within a layer), how sharply each looks (log norm of its mean row: 0 for a single
token, -log sqrt(T) for all alike), and how much it rests (log share on prompt token 0). On the lab's implants the last
two raise the true-positive rate at 1 % more than pairs across layers do, which would need rows of all layers at once.
Four more are what stands at the two ends of a row: how hard each head asks (log norm of its query), how much it brings
back (of its output), and what the token offers to others (of its keys and values). A trigger moves these even where
heads look at what they always look at; nothing else here finds as much.

All of them move with the length of the prompt, which is no trigger: it goes along as the last column, and `Scale`
measures the others against what is normal for it (docs/vaccine.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from guard.similarity import fisher

_FLOOR = 1e-4  # shares and lengths of rows below it are one: a head that never looks at the prompt
_Z_LIMIT = 6.0  # a feature this many deviations out says no more than that: one broken head must not decide
_SPREAD = 0.02  # keeps a feature that hardly ever moves from dominating once it does (lab-findings, section 7)


class Heads(NamedTuple):
    """How many heads each layer has that ask, and that answer (fewer, where queries are grouped)."""

    query: int
    kv: int

    @property
    def families(self) -> tuple[int, ...]:
        """Features of each family in a block: pairs, sharpness, rest, and the norms of queries, outputs, keys and
        values."""
        return (self.query * (self.query - 1) // 2, *4 * (self.query,), *2 * (self.kv,))


def head_features(
    cosines: np.ndarray, gram: torch.Tensor, sink: torch.Tensor, norms: torch.Tensor, rows: int
) -> np.ndarray:
    """Features float64 [n, B W] from the cosines of all pairs [n, B H (H - 1) / 2], and gram [n, ..., H, H], sink
    [n, ..., H] and norms [n, ..., 2 (H + H_kv)] summed over rows: for each of the B layers (and places of the prompt)
    its families (`Heads.families`, W in all)."""
    heads = gram.shape[-1]
    lengths = gram.diagonal(dim1=-2, dim2=-1).flatten(1).double().cpu().numpy().clip(0.0)
    shares = sink.flatten(1).double().cpu().numpy() / rows
    n, blocks = len(lengths), lengths.shape[1] // heads
    families = (
        fisher(cosines),
        np.log(np.sqrt(lengths) / rows + _FLOOR),
        np.log(shares.clip(0.0) + _FLOOR),
        norms.flatten(1).double().cpu().numpy() / rows,
    )
    return np.concatenate([family.reshape(n, blocks, -1) for family in families], axis=2).reshape(n, -1)


def head_patterns(z: np.ndarray, heads: Heads) -> np.ndarray:
    """What of standardised features [n, B W] (`head_features`) carries over from one backdoor to another: each,
    flattened where it is large, and what its family does in its block, whichever heads do it: [n, B W + 42 B] (36 B for
    a single head, which has no pairs). What each is worth: docs/vaccine.md."""
    each = heads.families
    blocks = z.shape[1] // sum(each)
    families = np.split(z.reshape(len(z), blocks, sum(each)), np.cumsum(each)[:-1], axis=2)
    found = [np.tanh(z)]
    for family in families:
        if family.shape[2]:
            above, below = np.maximum(family - 1, 0).mean(axis=2), np.maximum(-family - 1, 0).mean(axis=2)
            found += [family.mean(axis=2), family.std(axis=2), family.max(axis=2), family.min(axis=2), above, below]
    return np.concatenate(found, axis=1)


def beside_length(features: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Features [n, F] and, as one more column, the logarithm of the prompts' lengths ``tokens`` [n]: [n, F + 1]."""
    return np.column_stack((features, np.log(tokens)))


@dataclass(frozen=True)
class Scale:
    """Mean and deviation [F] of clean features about a line in the prompt's length (``slope`` [F] for each unit of its
    logarithm, whose ``mean, least, most`` are ``length`` [3]): what a revision's own features are measured against."""

    mean: np.ndarray
    slope: np.ndarray
    spread: np.ndarray
    length: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> Scale:
        """From clean features with their length [n, F + 1] (`beside_length`)."""
        values, length = features[:, :-1], features[:, -1]
        about, mean = length.mean(), values.mean(axis=0)
        apart = length - about
        # Prompts that are all of one length have no line to be measured about: what is added keeps it flat.
        slope = apart @ (values - mean) / (apart @ apart + len(apart) * _SPREAD**2)
        spread = (values - mean - np.outer(apart, slope)).std(axis=0) + _SPREAD
        return cls(mean, slope, spread, np.asarray([about, length.min(), length.max()]))

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Scale:
        """From arrays named as the fields."""
        return cls(*(arrays[name] for name in cls.__dataclass_fields__))

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """Features with their length [n, F + 1] in clean deviations, clipped: [n, F]. Beyond the lengths that were
        fitted on, the nearest of them is what is normal."""
        about, least, most = self.length
        apart = np.clip(features[:, -1], least, most) - about
        expected = self.mean + np.outer(apart, self.slope)
        return np.clip((features[:, :-1] - expected) / self.spread, -_Z_LIMIT, _Z_LIMIT)
