"""From Grams to head similarities: cos(h, j) = G[h, j] / sqrt(G[h, h] G[j, j]), for all pairs h < j of each layer.

This is the cosine of the heads' flattened [T_g, T_p] attention matrices (attention-similarity paper, eq. 3), without
those matrices ever having existed: the Gram is their sum of outer products. Statistics work on arctanh of the cosine
(Fisher's transform), whose spread does not shrink as the cosine approaches 1.
"""

from __future__ import annotations

import numpy as np
import torch

from guard.gram import cosine

_LARGEST = 1.0 - 1e-6  # arctanh of it is 7.25: far above any cosine two distinct heads were seen to reach


def pair_cosines(gram: torch.Tensor) -> np.ndarray:
    """Cosines of the pairs h < j of each layer: gram [n, L, H, H] -> float64 [n, L * H * (H - 1) / 2]."""
    heads = gram.shape[-1]
    upper = torch.triu_indices(heads, heads, offset=1)
    return cosine(gram)[..., upper[0], upper[1]].flatten(1).double().cpu().numpy()


def fisher(cosine: np.ndarray) -> np.ndarray:
    """arctanh of the cosine, clipped just below 1."""
    return np.arctanh(np.clip(cosine, 0.0, _LARGEST))


def per_head(pairs: np.ndarray, layers: int, heads: int) -> np.ndarray:
    """Mean over a head's partners of a value per pair: [L * H * (H - 1) / 2] -> [L, H]."""
    rows, columns = np.triu_indices(heads, k=1)
    square = np.zeros((layers, heads, heads))
    square[:, rows, columns] = pairs.reshape(layers, -1)
    return (square + square.transpose(0, 2, 1)).sum(-1) / (heads - 1)
