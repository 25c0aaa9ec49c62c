"""The density of clean features: a mixture of Gaussians, since traffic has tasks and each has its own pattern of heads.

One Gaussian (a Mahalanobis distance) spreads its ellipse over the gaps between tasks, and that is where triggered
requests lie: on the lab's implants a mixture finds several times as many of them at the same false-alarm rate. The
number of components is the one under which held-out clean requests are likeliest.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

_DIRECTIONS = 60
_COMPONENTS = (1, 2, 4, 8, 16)
_LEAST_MEMBERS = 100  # requests per component, or a covariance of sixty directions is noise
_RIDGE = 0.03  # added to each component's variances, in units of the whole's
_SEED = 0


def fit_mixture(z: np.ndarray) -> dict[str, np.ndarray]:
    """Fit standardised clean features [n, F]: project [F, k], means [M, k], factors [M, k, k], log_weights [M]."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and only calibration needs it
    from sklearn.mixture import GaussianMixture

    n, width = z.shape
    # The singular vectors of the n requests, not the eigenvectors of the F x F covariance: a model of 32 layers of 32
    # heads has 18,000 features.
    _, lengths, directions = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    kept = min(_DIRECTIONS, max(1, n // 10), width)
    project = directions[:kept].T / np.sqrt((lengths[:kept] ** 2 / (n - 1)).clip(1e-6))
    white = z @ project
    order = np.random.default_rng(_SEED).permutation(n)
    train, test = white[order[n // 5 :]], white[order[: n // 5]]

    def fitted(components: int, points: np.ndarray) -> GaussianMixture:
        model = GaussianMixture(components, reg_covar=_RIDGE, random_state=_SEED, max_iter=40, tol=1e-2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(points)

    choices = [c for c in _COMPONENTS if c == 1 or n // c >= _LEAST_MEMBERS]
    best = choices[0] if len(choices) == 1 else max(choices, key=lambda c: fitted(c, train).score(test))
    model = fitted(best, white)
    return {
        "project": project,
        "means": model.means_,
        "factors": model.precisions_cholesky_,
        "log_weights": np.log(model.weights_),
    }


def log_density(z: np.ndarray, fitted: Mapping[str, np.ndarray]) -> np.ndarray:
    """Log density [n] of standardised features [n, F] under a fitted mixture (nats, up to a constant)."""
    white = z @ fitted["project"]
    factors = fitted["factors"]
    turned = np.einsum("nk,mkj->nmj", white, factors) - np.einsum("mk,mkj->mj", fitted["means"], factors)
    log_det = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
    log_parts = fitted["log_weights"] + log_det - 0.5 * (turned**2).sum(axis=2)
    most = log_parts.max(axis=1, keepdims=True)
    return most[:, 0] + np.log(np.exp(log_parts - most).sum(axis=1))
