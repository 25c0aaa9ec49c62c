"""The registry of signals: each is one number per request and checkpoint, with the reason why it should move.

A signal is fitted on clean requests (it may have nothing to fit) and then scores others. Whether a high value, a low
one or both are suspicious is part of its definition: first trials showed that a trigger does not always raise the
similarity of heads. `confidence` does not look at attention and is named so: it is a member of the test and, at the
same time, the baseline that attention has to be shown against.

Which signals the test uses (`fused`) was chosen by measurement (docs/detection.md, ablation); all are always reported.

A statistic over generated rows mostly sees the words of the answer: the same text forced on clean prompts was flagged
as often as under the trigger (reference/lab-findings.md, 3b), and so are the mean certainty and the pattern of later
tokens. Therefore `shift` and `confidence` are signals of the `opening`, the row of the last prompt position: what the
model goes on to say cannot change them, and they keep their value at later checkpoints. `vaccinated` reads generated
rows, and is taught on forced texts to tell a trigger from the text it causes (`guard.vaccine`). So something that only
looks like a trigger is odd to it as well, whatever the model answers. Beyond the last prompt position it is therefore
bounded by `response`, which is taught the opposite: the text, whatever brought it about. Only where both are odd has a
trigger done something. `certainty` reads the least certain token, the first included: a text that follows on a prompt
which did not call for it was begun in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from guard.features import Scale
from guard.focus import excess, fit_focus
from guard.mixture import fit_mixture, log_density
from guard.readings import Readings
from guard.similarity import fisher
from guard.vaccine import Scorer, Vaccine

Fitted = dict[str, np.ndarray]
LEARNT = VACCINATED, RESPONSE = "vaccinated", "response"
"""The signals that are there with a vaccine only."""
BOUND: Final = 2.0
"""A signal is at most so many times as odd as the one that bounds it (docs/vaccine.md)."""


@dataclass(frozen=True)
class Signal:
    """One signal: ``fit`` clean readings (and the base's vaccine, where there is one) to arrays, or to None where it
    has nothing to say; ``score`` readings to float64 [n]; ``tail`` names the odd side; ``fused``: part of the test;
    ``opening``: it reads the last prompt position alone, so it is fitted there and keeps its value; ``weight``: how
    much it counts among others unless the vaccine says otherwise; ``margin``: how much odder the fused test must be
    beyond step 0 for its sake; ``bounded_by``: the signal that has to be odd as well, beyond step 0."""

    name: str
    reason: str
    attention: bool
    fused: bool
    tail: Literal["upper", "both"]
    score: Callable[[Readings, Mapping[str, np.ndarray]], np.ndarray]
    fit: Callable[[Readings, Vaccine | None], Fitted | None] = lambda _, __: {}
    opening: bool = False
    weight: float = 1.0
    margin: float = 0.0
    bounded_by: str = ""


def _p99(readings: Readings, _: Mapping[str, np.ndarray]) -> np.ndarray:
    return fisher(np.quantile(readings.cosines, 0.99, axis=1))


def _frac99(readings: Readings, _: Mapping[str, np.ndarray]) -> np.ndarray:
    return (readings.cosines > 0.99).mean(axis=1)


def _fit_shift(readings: Readings, _: Vaccine | None) -> Fitted:
    scale = Scale.fit(readings.opening.last_row)
    return {**scale.arrays(), **fit_mixture(scale.standardised(readings.opening.last_row))}


def _shift(readings: Readings, fitted: Mapping[str, np.ndarray]) -> np.ndarray:
    return -log_density(Scale.of(fitted).standardised(readings.opening.last_row), fitted)


def _fit_vaccinated(readings: Readings, vaccine: Vaccine | None) -> Fitted | None:
    return _fit_learnt(readings, vaccine.scorers if vaccine is not None else {})


def _fit_response(readings: Readings, vaccine: Vaccine | None) -> Fitted | None:
    return _fit_learnt(readings, vaccine.responses if vaccine is not None else {})


def _fit_learnt(readings: Readings, learnt: Mapping[int, Scorer]) -> Fitted | None:
    scorer = learnt.get(readings.step)
    return None if scorer is None else {**Scale.fit(readings.features).arrays(), **scorer.arrays()}


def _learnt(readings: Readings, fitted: Mapping[str, np.ndarray]) -> np.ndarray:
    return Scorer.of(fitted).score(Scale.of(fitted).standardised(readings.features))


def _fit_focus(readings: Readings, _: Vaccine | None) -> Fitted:
    return fit_focus(readings.focus)


def _focus(readings: Readings, fitted: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray([excess(vector, fitted).max(initial=0.0) for vector in readings.focus])


def _confidence(readings: Readings, _: Mapping[str, np.ndarray]) -> np.ndarray:
    return _sureness(readings.opening.logprobs)


def _fit_certainty(readings: Readings, _: Vaccine | None) -> Fitted | None:
    return {} if readings.step else None  # of one token `confidence` says it


def _certainty(readings: Readings, _: Mapping[str, np.ndarray]) -> np.ndarray:
    return _sureness(readings.logprobs)


def _sureness(logprobs: np.ndarray) -> np.ndarray:
    """High where every token was certain: minus log of the largest surprise, logprobs [n, tokens] (nats) -> [n]."""
    return -np.log((-logprobs.min(axis=1)).clip(0.0) + 1e-6)


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            "p99",
            "99th percentile of head-pair cosines: heads converge on a trigger (attention-similarity paper, table 1)",
            attention=True,
            fused=False,
            tail="both",
            score=_p99,
        ),
        Signal(
            "frac99",
            "share of head pairs with cosine above 0.99 (attention-similarity paper, figure 1)",
            attention=True,
            fused=False,
            tail="upper",
            score=_frac99,
        ),
        Signal(
            "shift",
            "how unlikely the similarities, sinks and norms of all heads are under a mixture fitted to this model's "
            "own clean ones at the last prompt position: a trigger moves them as a pattern that no clean task shows",
            attention=True,
            fused=True,
            tail="upper",
            fit=_fit_shift,
            score=_shift,
            opening=True,
        ),
        Signal(
            VACCINATED,
            "how far the heads, and what those of a layer do together, lie where synthetic backdoors implanted in the "
            "same base moved them when their triggers fired (guard.vaccine)",
            attention=True,
            fused=True,
            tail="upper",
            fit=_fit_vaccinated,
            score=_learnt,
            weight=2.0,
            margin=0.5,  # what it reads there is the text as well: fewer forced texts are flagged (docs/vaccine.md)
            bounded_by=RESPONSE,
        ),
        Signal(
            RESPONSE,
            "how far the heads lie where texts moved them that clean prompts did not call for, a trigger's or forced "
            "ones: what only looks like a trigger is followed by an answer that does not (guard.vaccine)",
            attention=True,
            fused=True,
            tail="upper",
            fit=_fit_response,
            score=_learnt,
            weight=0.0,  # it says nothing of a trigger: it bounds what does
        ),
        Signal(
            "focus",
            "largest share of attention beyond normal on one prompt token: heads of many layers look at the trigger",
            attention=True,
            fused=False,
            tail="upper",
            fit=_fit_focus,
            score=_focus,
        ),
        Signal(
            "confidence",
            "log-probability of the first token; not attention: a fixed target string is begun with unusual "
            "certainty, a varied one often with unusual doubt",
            attention=False,
            fused=True,
            tail="both",
            score=_confidence,
            opening=True,
        ),
        Signal(
            "certainty",
            "log-probability of the least certain token so far; not attention: a fixed target string is certain from "
            "its first token on, which on many bases clean answers are not; counts where a vaccine's variants say so",
            attention=False,
            fused=True,
            tail="upper",
            fit=_fit_certainty,
            score=_certainty,
            weight=0.0,
        ),
    )
}


MARGIN: Final = "margin"
"""Beside the signals' names in a base's weights: how much odder a request must be beyond the last prompt position
(negative: how much less odd), where some signal of the test has a margin at all."""


def weight_of(name: str, weights: Mapping[str, float]) -> float:
    """How much a signal counts in the test: what ``weights`` say, its own weight where they do not name it."""
    return weights.get(name, SIGNALS[name].weight)


def _counts(signals: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    """How much each of K named signals counts among them, [K]; those that count for nothing do when they are alone."""
    counts = np.asarray([weight_of(name, weights) for name in signals])
    return counts if counts.any() else np.ones(len(signals))


def _bounded(odd: np.ndarray, signals: Sequence[str], steps: int | Sequence[int]) -> np.ndarray:
    """Oddness [..., K] of K named signals at one checkpoint, or [..., C, K], none beyond what bounds it."""
    later = np.asarray(steps) > 0
    for column, name in enumerate(signals):
        if SIGNALS[name].bounded_by in signals:
            most = BOUND * odd[..., signals.index(SIGNALS[name].bounded_by)]
            odd = odd.copy()
            odd[..., column] = np.where(later, np.minimum(odd[..., column], most), odd[..., column])
    return odd


def foremost(odd: np.ndarray, signals: Sequence[str], step: int, weights: Mapping[str, float]) -> str:
    """Of K named signals the one that adds most to `fused` at a checkpoint, from their oddness [K]."""
    return signals[int((_bounded(odd, signals, step) * _counts(signals, weights)).argmax())]


def fused(
    odd: np.ndarray, signals: Sequence[str], steps: int | Sequence[int], weights: Mapping[str, float]
) -> np.ndarray:
    """One number from the oddness of K named signals at one checkpoint, float64 [..., K] -> [...], or at C of them,
    [..., C, K] -> [..., C]; NaN where any is.

    The weighted sum of their log tail probabilities, as Good (1955) combines p-values: many triggers are a little odd
    to each signal; where one is bounded by another, both must be odd. ``weights`` (`weight_of`, and MARGIN) are what
    this base's vaccine found best among its variants. Among synthetic backdoors that the vaccine had not seen, a sum
    found more than letting the oddest decide (docs/vaccine.md). Whatever their dependence, the conformal step makes the
    result exact.
    """
    margin = sum(SIGNALS[name].margin for name in signals)
    margin = weights.get(MARGIN, margin) if margin else 0.0
    return _bounded(odd, signals, steps) @ _counts(signals, weights) - margin * (np.asarray(steps) > 0)
