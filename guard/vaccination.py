"""How a vaccine is learnt from measured variants: scorers for each checkpoint, and how much each signal counts.

What a signal is worth hangs on the base. Where it is sure of its answers, a doubtful first token is odd; where it never
is, `confidence` tells nothing and only raises the threshold. The variants know: each is looked for by scorers that the
other passes over the families taught, and the weights are those under which most of them are found while little of what
must stay quiet is flagged, and the most part of what is found before the first token. So a base chooses its own
weights, and no backdoor that the guard is measured on has a say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from guard.calibration import fit_checkpoint, oddness_at
from guard.errors import CalibrationError
from guard.features import Heads, Scale, head_patterns
from guard.profile import Checkpoint
from guard.readings import Measurement
from guard.signals import BOUND, LEARNT, MARGIN, RESPONSE, SIGNALS, VACCINATED, fused
from guard.tail import Tail
from guard.vaccine import Sample, Scorer, Vaccine

BESIDE: tuple[str, ...] = tuple(name for name, s in SIGNALS.items() if s.fused and name not in LEARNT)
"""The signals that the test has beside the vaccine's."""

_RIDGE = 0.3  # added to the variance of each pattern, which is about 1 (docs/vaccine.md)
# scikit-learn's own 1e-4 leaves half a percent of a direction to rounding, and with it the choice between like weights.
_SOLVED = 1e-6
_SPREAD = 1e-3  # keeps a pattern that never moves from being divided by nothing
# Each forced text counts so often: among variants left out one at a time this kept the share of forced texts that are
# flagged at 0.05 when prompts of an unusual shape were added to the negatives (0.08 with once), for 0.01 of triggers.
_FORCED = 2
# Each request that must stay quiet counts so much: what it is answered spares it, and a direction that need not tell it
# from a trigger tells forced texts better (docs/vaccine.md).
_QUIET = 0.25
_LEAST = 50  # triggered requests that a checkpoint needs, over all variants
_FEWEST = 20  # normal requests of one variant that what is normal at a checkpoint can be fitted on
_FOLDS = 3  # as many as the default plan makes passes over the families: siblings of each family are left to teach
_TRIED = (0.25, 0.5, 1.0, 2.0)  # weights of each signal beside the vaccine's, which keeps its own
_MARGINS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # beyond the last prompt position
_ALPHA = 0.01
# Shares that may be flagged of forced texts and of what must stay quiet, means over variants of which some are above
# them; and the least share of what is found that is found before the first token.
_MOST_FORCED, _MOST_QUIET, _LEAST_FIRST = 0.03, 0.04, 0.6
_LEARNT = {
    "ridge": _RIDGE,
    "counts": {"forced": _FORCED, "quiet": _QUIET},
    "bound": BOUND,
    "tried": {"folds": _FOLDS, "weights": list(_TRIED), "margins": list(_MARGINS)},
    "limits": {"alpha": _ALPHA, "forced": _MOST_FORCED, "quiet": _MOST_QUIET, "first": _LEAST_FIRST},
}


def oddness_beside(
    normal: Measurement,
    fired: Measurement,
    forced: Measurement,
    quiet: Sequence[Measurement] = (),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What the signals beside the vaccine's make of a variant, fitted on the first half of its n ``normal`` requests:
    oddness of the second half (``normal`` [n - n // 2, C, K]), of the m that ``fired`` ([m, C, K]), of the second half
    with the variant's target ``forced`` ([n - n // 2, C, K]) and of those that must stay ``quiet``, one group after the
    other, at the C checkpoints measured, K as BESIDE; NaN where a request had ended, or too few had come that far to
    fit on."""
    first, second = _halves(len(normal))
    judged = [("normal", normal, second), ("fired", fired, np.arange(len(fired))), ("forced", forced, second)]
    judged += [("quiet", group, np.arange(len(group))) for group in quiet]
    odd: list[list[np.ndarray]] = [[] for _ in judged]
    opening: Checkpoint | None = None
    for step in sorted(normal.at):
        readings = normal.reached(step)
        mine = np.flatnonzero(np.isin(readings.index, first))
        few = opening is not None and len(mine) < _FEWEST
        point = None if few else fit_checkpoint(readings.take(mine), BESIDE, None, seed, opening)
        opening = opening or point
        for place, (_, those, wanted) in enumerate(judged):
            empty = np.full((len(wanted), len(BESIDE)), np.nan)
            odd[place].append(empty if point is None else oddness_at(point, those.reached(step), wanted, BESIDE))
    by_kind: dict[str, list[np.ndarray]] = {"quiet": [np.empty((0, len(normal.at), len(BESIDE)))]}
    for (kind, *_), by_step in zip(judged, odd, strict=True):
        by_kind.setdefault(kind, []).append(np.stack(by_step, axis=1))
    return {kind: np.concatenate(groups) for kind, groups in by_kind.items()}


def _halves(n: int) -> list[np.ndarray]:
    """Of a variant's n normal requests those that what is normal is fitted on, and those that are judged by it."""
    return np.split(np.arange(n), [n // 2])


def fit_vaccine(
    samples: Sequence[Sample],
    *,
    base: str,
    probe: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Vaccine:
    """Learn from measured variants; ``progress`` is told for how many sets of variants, of how many, a checkpoint is
    learnt. Raises CalibrationError when no checkpoint has enough requests that fired."""
    heads, folds = Heads(probe["heads"], probe["kv_heads"]), _folds(samples)
    names = [{sample.name for sample in left_out} for left_out in folds]
    others = [[sample for sample in samples if sample.name not in left_out] for left_out in names]
    learnt, *of_others = _learnt([samples, *others], heads, progress)
    if 0 not in learnt[VACCINATED]:
        raise CalibrationError(
            f"the variants fired on fewer than {_LEAST} measured prompts at the last prompt position: nothing to "
            "learn from. Train them longer, or on more rows."
        )
    about = {**(facts or {}), "variants": [sample.name for sample in samples], "learnt": _LEARNT}
    return Vaccine(base, probe, learnt[VACCINATED], learnt[RESPONSE], _weights(folds, of_others), about)


def learnt_as_today(vaccine: Vaccine) -> bool:
    """Whether a vaccine was learnt as `fit_vaccine` learns now; one that was not is valid, and may be learnt again from
    its variants."""
    return vaccine.facts.get("learnt") == _LEARNT


def _folds(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Variants that are left out together, to be looked for by what the others teach; none of too few."""
    judged = [sample for sample in samples if len(sample.beside) and len(sample.beside["fired"])]
    if len(judged) < 2 * _FOLDS:
        return []
    return [[judged[place] for place in fold] for fold in np.array_split(np.arange(len(judged)), _FOLDS)]


Learnt = Mapping[str, Mapping[int, Scorer]]
"""Scorers by checkpoint, of VACCINATED and of RESPONSE."""


class _Taught(NamedTuple):
    """What one variant teaches at a checkpoint: patterns [n, D] of its requests, by what these are
    (`guard.vaccine.Sample`)."""

    normal: np.ndarray
    quiet: np.ndarray
    forced: np.ndarray
    fired: np.ndarray


def _learnt(
    taught: Sequence[Sequence[Sample]], heads: Heads, progress: Callable[[int, int], None] | None
) -> list[dict[str, dict[int, Scorer]]]:
    """For each of several sets of variants the scorers of each checkpoint at which enough triggered requests were
    measured. What a variant teaches is worked out once for all sets that it is in."""
    found: list[dict[str, dict[int, Scorer]]] = [{VACCINATED: {}, RESPONSE: {}} for _ in taught]
    everyone = {sample.name: sample for samples in taught for sample in samples}
    steps = sorted({step for sample in everyone.values() for step in sample.normal})
    for number, step in enumerate(steps):
        lessons = {name: lesson for name, sample in everyone.items() if (lesson := _lesson(sample, step, heads))}
        for place, (samples, scorers) in enumerate(zip(taught, found, strict=True)):
            theirs = [lessons[sample.name] for sample in samples if sample.name in lessons]
            if sum(len(lesson.fired) for lesson in theirs) >= _LEAST:
                silent = {"normal": 1.0, "quiet": _QUIET, "forced": _FORCED}
                scorers[VACCINATED][step] = _discriminant(theirs, silent, ("fired",), heads)
                if step:
                    silent = {"normal": 1.0, "quiet": 1.0}
                    scorers[RESPONSE][step] = _discriminant(theirs, silent, ("fired", "forced"), heads)
            if progress is not None:
                progress(number * len(taught) + place + 1, len(steps) * len(taught))
    return found


def _lesson(sample: Sample, step: int, heads: Heads) -> _Taught | None:
    """What a variant teaches at a checkpoint, in its own deviations; None where too few clean requests came so far."""
    normal = sample.normal.get(step)
    if normal is None or len(normal) < _LEAST:
        return None
    scale = Scale.fit(normal)
    nothing = np.empty((0, normal.shape[1]))

    def patterns(group: np.ndarray) -> np.ndarray:  # in single precision: there are many
        return head_patterns(scale.standardised(group).astype(np.float32), heads)

    others = (sample.quiet, sample.forced, sample.fired)
    return _Taught(patterns(normal), *(patterns(group.get(step, nothing)) for group in others))


def _discriminant(taught: Sequence[_Taught], silent: Mapping[str, float], fired: Sequence[str], heads: Heads) -> Scorer:
    """What tells the groups of requests that ``fired`` from those that were ``silent`` (and count so much each):
    Fisher's direction, by ridge regression on which is which, in deviations of the silent ones' scores."""
    from sklearn.linear_model import Ridge  # slow to import, and only vaccination needs it

    groups = [(getattr(lesson, kind), times) for lesson in taught for kind, times in silent.items()]
    counts = np.repeat(np.asarray([times for _, times in groups], np.float32), [len(group) for group, _ in groups])
    seen = np.concatenate([group for group, _ in groups] + [getattr(lesson, k) for lesson in taught for k in fired])
    n, m = len(counts), len(seen) - len(counts)
    share = counts / counts.sum()
    seen -= share @ seen[:n]
    spread = np.sqrt(np.einsum("n,nd,nd->d", share, seen[:n], seen[:n])) + _SPREAD
    seen /= spread
    fires, weights = np.r_[np.zeros(n), np.ones(m)], np.r_[counts, np.ones(m)]
    # By conjugate gradients: a large model has more patterns than a matrix of them all could hold.
    ridge = Ridge(_RIDGE * weights.sum(), solver="lsqr", tol=_SOLVED).fit(seen, fires, sample_weight=weights)
    deviation = np.sqrt(share @ (seen[:n] @ ridge.coef_) ** 2)
    return Scorer((ridge.coef_ / spread / deviation).astype(np.float32), np.asarray(heads))


def _weights(folds: Sequence[Sequence[Sample]], learnt: Sequence[Learnt]) -> dict[str, float]:
    """How much each signal of the test counts, from what finds the variants of each fold; the registry's weights where
    there is none."""
    usual = {name: SIGNALS[name].weight for name in (*BESIDE, VACCINATED)} | {MARGIN: SIGNALS[VACCINATED].margin}
    if not folds:
        return usual
    steps = sorted(folds[0][0].normal)
    odd_of = [_oddness(sample, found) for fold, found in zip(folds, learnt, strict=True) for sample in fold]
    columns = (*BESIDE, *LEARNT)
    every = {kind: np.concatenate([odd[kind] for odd in odd_of]) for kind in odd_of[0]}

    def found(weights: Mapping[str, float]) -> float:
        """Mean over the variants of the share found at 1 % of false alarms over all; less than nothing where a limit
        is not kept, the less the further from it."""

        def sums(odd: np.ndarray) -> np.ndarray:
            return fused(odd, columns, steps, weights)

        limit = np.quantile(np.nanmax(sums(every["normal"]), axis=1), 1 - _ALPHA)
        flagged = {kind: np.nanmax(sums(odd), axis=1) > limit for kind, odd in every.items()}
        first = (sums(every["fired"])[:, 0] > limit).sum() / max(1, flagged["fired"].sum())
        beyond = [flagged["forced"].mean() / _MOST_FORCED, _LEAST_FIRST / max(float(first), 1e-6)]
        beyond += [flagged["quiet"].mean() / _MOST_QUIET] if len(flagged.get("quiet", ())) else []
        if max(beyond) > 1:
            return -float(max(beyond))
        ends = np.cumsum([len(odd["fired"]) for odd in odd_of])[:-1]
        return float(np.mean([own.mean() for own in np.split(flagged["fired"], ends)]))

    others = product(*(_TRIED if SIGNALS[name].weight else (0.0, *_TRIED) for name in BESIDE), _MARGINS)
    # The usual ones first: they stay unless others find more.
    return max([usual, *(usual | dict(zip((*BESIDE, MARGIN), tried, strict=True)) for tried in others)], key=found)


def _oddness(sample: Sample, learnt: Learnt) -> dict[str, np.ndarray]:
    """Oddness [n, C, K + 2] of a variant's requests (as `oddness_beside`), BESIDE and then what was learnt, at the C
    checkpoints it was measured at."""
    own: dict[str, list[np.ndarray]] = {kind: [] for kind in sample.beside}
    for place, step in enumerate(sorted(sample.normal)):
        there = {kind: np.isfinite(odd[:, place]).all(axis=1) for kind, odd in sample.beside.items()}
        count = {kind: int(mask.sum()) for kind, mask in there.items()}
        # Requests come in order: a second half last, and those that fired before those with a text forced.
        normal = sample.normal[step]
        second = len(normal) - count["normal"]
        features = {"normal": normal[second:], "fired": sample.fired[step][: count["fired"]]}
        features["forced"] = sample.forced[step][-count["forced"] :] if step and count["forced"] else normal[second:]
        if "quiet" in count:
            features["quiet"] = sample.quiet[step][: count["quiet"]]
        column = {kind: np.where(mask[:, None], np.zeros(len(LEARNT)), np.nan) for kind, mask in there.items()}
        if count["normal"]:
            scale = Scale.fit(normal[:second])
            fitted = scale.standardised(normal[:second])
            told = {kind: scale.standardised(features[kind]) for kind in there if count[kind]}
            for number, name in enumerate(LEARNT):
                if step in learnt[name]:
                    scorer = learnt[name][step]
                    tail = Tail(np.sort(scorer.score(fitted)), SIGNALS[name].tail)
                    for kind, z in told.items():
                        column[kind][there[kind], number] = tail.oddness(scorer.score(z))
        for kind, values in column.items():
            own[kind].append(values)
    return {kind: np.concatenate((odd, np.stack(own[kind], axis=1)), axis=2) for kind, odd in sample.beside.items()}
