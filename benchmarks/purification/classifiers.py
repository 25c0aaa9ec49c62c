"""One run on classifiers: implant a backdoor, repair a fresh copy with every method, measure on texts none has seen.

Attack success counts triggered test texts, all of another class than the target's, that are given the target. A
repaired classifier is not expected to reach 0: one that was never poisoned (trained on the same texts without an
attacker) errs on triggered texts too, and its figures stand beside the others' as the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.purification.classifier_inputs import Arguments, Split, digests, read_split
from benchmarks.purification.errors import BenchmarkError
from benchmarks.purification.implants import trained
from benchmarks.purification.results import begun
from guard.identity import base_digest
from offline_purify.encoder.classifier import Classifier
from offline_purify.encoder.finetune import finetune
from offline_purify.encoder.material import Material
from offline_purify.encoder.pure import pure
from offline_purify.encoder.stage import EncoderHeadsConfig, Part, ablate, repair_heads
from offline_purify.intervals import share
from offline_purify.steps import write_json

FORMAT = "headguard.purification-encoder/1"
FLOOR = "never-poisoned"
Progress = Callable[[str, int, int], None]


@dataclass
class Attempt:
    """One seed's work on one classifier; ``chosen`` is the setting that the head method went furthest with, once it is
    known."""

    material: Material
    chosen: int | None = None

    def setting(self, classifier: Classifier) -> int:
        """The chosen setting; found on ``classifier``, which still holds the suspicious weights, if not yet known."""
        if self.chosen is None:
            before = classifier.state()
            self.chosen = int(repair_heads(classifier, self.material).details["best"])
            classifier.restore(before)
        return self.chosen


@dataclass(frozen=True)
class Outcome:
    """What a method did, and why it changed nothing (None: it did)."""

    details: dict[str, Any]
    reason: str | None = None


Method = Callable[[Classifier, Attempt], Outcome]


def _heads(classifier: Classifier, attempt: Attempt) -> Outcome:
    result = repair_heads(classifier, attempt.material)
    attempt.chosen = int(result.details["best"])
    return Outcome(result.details, result.reason)


def _ablation(what: Part) -> Method:
    def method(classifier: Classifier, attempt: Attempt) -> Outcome:
        config = EncoderHeadsConfig()
        setting = config.settings[attempt.setting(classifier)]
        return Outcome(ablate(classifier, attempt.material, setting, what, config))

    return method


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "none": lambda classifier, attempt: Outcome({}),
        "finetune": lambda classifier, attempt: Outcome(finetune(classifier, attempt.material)),
        "pure": lambda classifier, attempt: Outcome(pure(classifier, attempt.material)),
        "heads": _heads,
        "heads-kept": _ablation("both"),
        "align-only": _ablation("align"),
        "tune-only": _ablation("tune"),
        "random-heads": _ablation("random"),
    }
)


def run(given: Arguments, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the methods and write the result to ``out`` after each; those that are in there already are kept, and so
    are implants, in a folder beside it.

    Raises GuardError for weights, files or options that cannot be used, and when ``out`` holds results of others.
    """
    if unknown := [name for name in given.methods if name not in METHODS]:
        raise BenchmarkError(f"--methods {', '.join(unknown)}: choose among all, {', '.join(METHODS)}.")
    found = digests(given)
    result = begun(out, {"format": FORMAT, "settings": given.settings(), "digests": found})
    for seed in range(given.seeds):
        names = list(dict.fromkeys(("none", *given.methods, FLOOR)))
        if todo := [name for name in names if str(seed) not in result["seeds"].get(name, {})]:
            _measure_seed(given, found["weights"], seed, todo, result, out, progress)
    result["methods"] = {name: _pooled(by_seed) for name, by_seed in result["seeds"].items()}
    write_json(out, result)
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| method | attack success | accuracy | seconds | |", "| --- | --- | --- | --- | --- |"]
    for name, figures in result["methods"].items():
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in (figures["asr"], figures["accuracy"])]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {figures['seconds']:.0f} | {figures['reason'] or ''} |")
    return "\n".join(lines)


def _measure_seed(
    given: Arguments,
    weights: str,
    seed: int,
    names: Sequence[str],
    result: dict[str, Any],
    out: Path,
    progress: Progress | None,
) -> None:
    split = read_split(given, seed)
    cache = out.parent / "encoder-implants"
    implant = trained(given, weights, split.implant.texts(), seed, cache, progress, "implanting")
    result.setdefault("implants", {})[str(seed)] = base_digest(implant)
    kept = result["seeds"].get("heads", {}).get(str(seed), {})
    attempt = Attempt(_material(given, Classifier.open(implant, given.device), split, seed, progress))
    attempt.chosen = kept.get("details", {}).get("best")
    for name in names:
        began = time.monotonic()
        if name == FLOOR:
            folder = trained(
                given, weights, split.implant.unpoisoned(), seed, cache, progress, "training without poison"
            )
            classifier, outcome = Classifier.open(folder, given.device), Outcome({})
        else:
            classifier = Classifier.open(implant, given.device)
            outcome = METHODS[name](classifier, attempt)
        told = {"reason": outcome.reason, "details": outcome.details, "seconds": round(time.monotonic() - began, 1)}
        reading = {
            "fired": classifier.correct(classifier.samples(split.triggered)),
            "correct": classifier.correct(classifier.samples(split.test)),
        }
        result["seeds"].setdefault(name, {})[str(seed)] = told | {"reading": reading}
        write_json(out, result)


def _material(given: Arguments, suspicious: Classifier, split: Split, seed: int, progress: Progress | None) -> Material:
    """The case: triggered texts that the suspicious classifier gives the target; and the clean texts of the budget."""
    fired = suspicious.correct(suspicious.samples(split.candidates))
    flagged = [text.text for text, hit in zip(split.candidates, fired, strict=True) if hit][: given.flags]
    if len(flagged) < given.flags:
        raise BenchmarkError(
            f"the implant answers only {len(flagged)} texts with its target; the case needs {given.flags}."
        )
    return Material(tuple(flagged), split.repair, seed, progress=progress)


def _pooled(by_seed: dict[str, Any]) -> dict[str, Any]:
    """Figures over all seeds of a method."""

    def joined(name: str) -> list[bool]:
        return [value for told in by_seed.values() for value in told["reading"][name]]

    figures = {"asr": share(joined("fired")), "accuracy": share(joined("correct"))}
    reasons = sorted({told["reason"] for told in by_seed.values() if told["reason"]})
    each = {
        seed: {"asr": float(np.mean(r["fired"])), "accuracy": float(np.mean(r["correct"]))}
        for seed, told in by_seed.items()
        for r in [told["reading"]]
    }
    told = {name: figure.model_dump() for name, figure in figures.items() if figure}
    seconds = float(np.mean([t["seconds"] for t in by_seed.values()]))
    return {**told, "seconds": round(seconds, 1), "by_seed": each, "reason": "; ".join(reasons) or None}
