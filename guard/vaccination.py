"""How a vaccine is learnt from measured variants: a scorer for each checkpoint, and how much each signal counts.

What a signal is worth hangs on the base. Where it is sure of its answers, a doubtful first token is odd; where it never
is, `confidence` tells nothing and only raises the threshold. The variants know: each is looked for by a scorer that the
other passes over the families taught, and the weights are those under which most of them are found. So a base chooses
its own weights, and no backdoor that the guard is measured on has a say.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from guard.calibration import fit_checkpoint, score
from guard.errors import CalibrationError
from guard.features import Scale
from guard.readings import Readings
from guard.signals import SIGNALS, VACCINATED, fused
from guard.tail import Tail
from guard.vaccine import Sample, Scorer, Vaccine

BESIDE: tuple[str, ...] = tuple(name for name, signal in SIGNALS.items() if signal.fused and name != VACCINATED)
"""The signals that the test has beside the vaccine's."""

_HIDDEN = 48
_MEMBERS = 3  # networks, each from its own seed; their log-odds are averaged
_PASSES = 12
_DECAY = 1.0
# Each forced text counts so often: among variants left out one at a time this kept the share of forced texts that are
# flagged at 0.05 when prompts of an unusual shape were added to the negatives (0.08 with once), for 0.01 of triggers.
_FORCED = 2
_LEAST = 50  # triggered requests that a checkpoint needs, over all variants
_FOLDS = 3  # as many as the default plan makes passes over the families: siblings of each family are left to teach
_TRIED = (0.25, 0.5, 1.0, 2.0)  # weights of each signal beside the vaccine's, which keeps its own
_ALPHA = 0.01


def oddness_beside(normal: Readings, fired: Readings, seed: int = 0) -> dict[str, np.ndarray]:
    """What the signals beside the vaccine's make of a variant at step 0, fitted on the first half of its n ``normal``
    requests: oddness of the second half (``normal`` [n - n // 2, K]) and of the m that ``fired`` ([m, K]), K as
    BESIDE."""
    first, second = _halves(len(normal.index))
    point = fit_checkpoint(normal.take(first), BESIDE, None, seed)
    return {"normal": score(point, normal.take(second), BESIDE), "fired": score(point, fired, BESIDE)}


def _halves(n: int) -> list[np.ndarray]:
    """Of a variant's n normal requests those that what is normal is fitted on, and those that are judged by it."""
    return np.split(np.arange(n), [n // 2])


def fit_vaccine(
    samples: Sequence[Sample],
    *,
    base: str,
    probe: Mapping[str, Any],
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> Vaccine:
    """Learn from measured variants. Raises CalibrationError when no checkpoint has enough requests that fired."""
    steps = sorted({step for sample in samples for step in sample.normal})
    scorers = {}
    for step in steps:
        quiet, fired = _standardised(samples, step)
        if len(fired) >= _LEAST:
            scorers[step] = _fit(quiet, fired, seed)
    if 0 not in scorers:
        raise CalibrationError(
            f"the variants fired on fewer than {_LEAST} measured prompts at the last prompt position: nothing to "
            "learn from. Train them longer, or on more rows."
        )
    about = {**(facts or {}), "variants": [sample.name for sample in samples], "seed": seed}
    return Vaccine(base, probe, scorers, _weights(samples, seed), about)


def _standardised(samples: Sequence[Sample], step: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of all variants' quiet and fired requests at a checkpoint, each in its own variant's deviations."""
    quiet: list[np.ndarray] = []
    fired: list[np.ndarray] = []
    for sample in samples:
        normal = sample.normal.get(step)
        if normal is None or len(normal) < _LEAST:
            continue
        scale = Scale.fit(normal)
        quiet.append(scale.standardised(normal))
        for group, into in ((sample.quiet, quiet), *_FORCED * ((sample.forced, quiet),), (sample.fired, fired)):
            if step in group and len(group[step]):
                into.append(scale.standardised(group[step]))
    empty = np.empty((0, 0))
    return (np.concatenate(quiet) if quiet else empty), (np.concatenate(fired) if fired else empty)


def _fit(quiet: np.ndarray, fired: np.ndarray, seed: int, members: int = _MEMBERS) -> Scorer:
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and only vaccination needs it
    from sklearn.neural_network import MLPClassifier

    z = np.concatenate((quiet, fired))
    label = np.r_[np.zeros(len(quiet)), np.ones(len(fired))]
    networks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for member in range(members):
            network = MLPClassifier((_HIDDEN,), alpha=_DECAY, max_iter=_PASSES, random_state=seed + member)
            networks.append(network.fit(z, label))
    return Scorer(
        np.stack([network.coefs_[0] for network in networks]),
        np.stack([network.intercepts_[0] for network in networks]),
        np.stack([network.coefs_[1][:, 0] for network in networks]),
        np.asarray([network.intercepts_[1][0] for network in networks]),
    )


def _weights(samples: Sequence[Sample], seed: int) -> dict[str, float]:
    """How much each signal of the test counts, chosen at step 0; the registry's weights where there are too few
    variants to leave some out."""
    usual = {name: SIGNALS[name].weight for name in (*BESIDE, VACCINATED)}
    judged = [sample for sample in samples if len(sample.beside) and len(sample.beside["fired"])]
    if len(judged) < 2 * _FOLDS:
        return usual
    clean, fired = [], []
    for fold in np.array_split(np.arange(len(judged)), _FOLDS):
        left_out = [judged[i] for i in fold]
        names = {sample.name for sample in left_out}
        scorer = _fit(*_standardised([s for s in samples if s.name not in names], 0), seed, members=1)
        for sample in left_out:
            odd = _oddness(sample, scorer)
            clean.append(odd["normal"])
            fired.append(odd["fired"])
    columns = (*BESIDE, VACCINATED)

    def found(weights: Mapping[str, float]) -> float:
        """Mean over the variants of the share found at 1 % of false alarms over all."""
        limit = np.quantile(fused(np.concatenate(clean), columns, 0, weights), 1 - _ALPHA)
        return float(np.mean([(fused(odd, columns, 0, weights) > limit).mean() for odd in fired]))

    others = product(_TRIED, repeat=len(BESIDE))
    # The usual ones first: they stay unless others find more.
    return max([usual, *(usual | dict(zip(BESIDE, tried, strict=True)) for tried in others)], key=found)


def _oddness(sample: Sample, scorer: Scorer) -> dict[str, np.ndarray]:
    """Oddness of a variant's second half of normal requests and of its fired ones, BESIDE and then VACCINATED."""
    normal = sample.normal[0]
    first, second = (normal[half] for half in _halves(len(normal)))
    scale = Scale.fit(first)
    tail = Tail(np.sort(scorer.log_odds(scale.standardised(first))), SIGNALS[VACCINATED].tail)
    features = {"normal": second, "fired": sample.fired[0]}
    own = {kind: tail.oddness(scorer.log_odds(scale.standardised(those))) for kind, those in features.items()}
    return {kind: np.column_stack((sample.beside[kind], odd)) for kind, odd in own.items()}
