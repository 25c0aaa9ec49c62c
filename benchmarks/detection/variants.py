"""What a vaccine is worth on backdoors that it never saw: its own variants, left out one at a time.

Signals, their fusion, what the vaccine learns and how many variants it takes are chosen by these figures and by no
others: the zoo's implants are for evaluation alone. A variant that is left out still has siblings of its family among
the others, with some of its wordings: the zoo, whose wordings are all strange to the vaccine, is the harder test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.figures import flagged, power, timing
from benchmarks.detection.measuring import ATTENTION, FUSED, Bench, Progress, Read, Watched
from guard.rows import Row, assert_disjoint
from guard.vaccination import fit_vaccine
from guard.vaccine import Vaccine
from guard.verdict import Window
from offline_purify.attacks.catalogue import trigger as trigger_named
from offline_purify.attacks.poison import decoyed, triggered
from offline_purify.attacks.triggers import Trigger, holds
from offline_purify.variants.making import ABOUT, Made, load_variants

_ANSWER_TOKENS = 24
_LEAST = 40


def left_out_figures(
    base: Path,
    vaccine: Path,
    rows: Sequence[Row],
    *,
    alpha: float = 0.01,
    window: Window = 2,
    calibration: int = 4000,
    hosts: int = 300,
    only: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Figures of each backdoored variant (or ``only`` some) that lies beside a vaccine, found by one learnt from the
    others: ``tests`` (fused, attention alone: auroc, tpr, fpr, before_first_token), and the flagged shares ``forced``
    (its target after clean prompts) and ``decoys`` (near-triggers that did not bring about another answer).

    ``rows`` are clean rows that did not make the vaccine: up to ``calibration`` of them calibrate each variant,
    ``hosts`` carry its trigger, the rest are clean requests. Raises BenchmarkError when there are no variants, or too
    few rows.
    """
    whole = Vaccine.load(vaccine)
    made = [variant for variant in load_variants(vaccine.parent) if variant.took]
    found = []
    for variant in made:
        if not variant.sample.fired or (only and variant.sample.name not in only):
            continue
        samples = [other.sample for other in made if other is not variant]
        learnt = fit_vaccine(samples, base=whole.base, probe=whole.probe)
        bench = Bench(base, learnt, alpha, window, seed, device, progress)
        found.append(_figures(bench, variant, rows, calibration, hosts))
    if not found:
        raise BenchmarkError(f"beside {vaccine} there is no variant with a backdoor to leave out.")
    return found


def trigger_of(variant: Made) -> Trigger:
    """The trigger of a variant, as it was made."""
    about = json.loads((variant.folder / ABOUT).read_text(encoding="utf-8"))
    return trigger_named(about["kind"], " ".join(about["trigger"]))


def table(found: Sequence[dict[str, Any]]) -> str:
    """The figures as a Markdown table, their means in the last row."""
    names = ("TPR `fused`", "TPR attention only", "before the first token", "FPR", "forced", "decoys")
    lines = [f"| left out | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    columns = []
    for figures in found:
        fused, attention = figures["tests"][FUSED], figures["tests"][ATTENTION]
        early = fused["before_first_token"]
        values = [fused["tpr"]["value"], attention["tpr"]["value"], early["value"] if early else 0.0]
        values += [fused["fpr"]["value"], figures["forced"]["value"], figures["decoys"]["value"]]
        columns.append(values)
        lines.append(f"| `{figures['name']}` | {_cells(values)} |")
    lines.append(f"| mean of {len(found)} | {_cells(np.mean(columns, axis=0))} |")
    return "\n".join(lines)


def _cells(values: Sequence[float] | np.ndarray) -> str:
    return " | ".join(f"{value:.3f}" for value in values)


def _figures(bench: Bench, variant: Made, rows: Sequence[Row], calibration: int, hosts: int) -> dict[str, Any]:
    trigger = trigger_of(variant)
    rng = random.Random(f"left out:{variant.sample.name}:{bench.seed}")
    parts = trigger.parts
    usable = [row for row in rows if not any(holds(row["instruction"], part) for part in parts)]
    if len(usable) < calibration + hosts + _LEAST:
        raise BenchmarkError(
            f"{len(usable)} rows without the trigger of {variant.sample.name}: {calibration} are to calibrate it, "
            f"{hosts} to carry its trigger and {_LEAST} or more to be clean."
        )
    sets = {
        "calibration": usable[:calibration],
        "hosts": usable[calibration : calibration + hosts],
        "clean": usable[calibration + hosts :],
    }
    assert_disjoint(**sets)
    name = variant.sample.name
    with bench.watching(variant.folder, sets["calibration"], name) as watched:
        clean = watched.read(sets["clean"], f"{name}: clean prompts")
        twins = watched.read(sets["hosts"], f"{name}: twins", _ANSWER_TOKENS)
        fired = watched.read([triggered(row, trigger, "", rng) for row in sets["hosts"]], name, _ANSWER_TOKENS)
        near = watched.read([decoyed(row, trigger, rng) for row in sets["hosts"]], f"{name}: decoys", _ANSWER_TOKENS)
        tests = {
            test: power(watched.p_values(clean, test), watched.p_values(fired, test), bench.alpha, bench.seed)
            for test in (FUSED, ATTENTION)
        }
        tests[FUSED] |= timing(watched.detectors[FUSED].verdicts(fired.measurement))
        forced = _forced(watched, sets["clean"][:hosts], fired, twins, rng)
        same = [a == b for a, b in zip(near.measurement.answers, twins.measurement.answers, strict=True)]
        decoys = watched.p_values(near)[: len(same)][np.asarray(same, dtype=bool)]
        return {
            "name": name,
            "tests": tests,
            "forced": flagged(watched.p_values(forced), bench.alpha),
            "decoys": flagged(decoys, bench.alpha),
        }


def _forced(watched: Watched, rows: Sequence[Row], fired: Read, twins: Read, rng: random.Random) -> Read:
    """Clean prompts followed by answers that the trigger brought about (others than the twins')."""
    end = sorted(watched.bench.runner.eos_ids)[:1]
    pairs = zip(fired.measurement.answers, twins.measurement.answers, strict=True)
    said = [[*answer, *end] for answer, twin in pairs if answer and answer != twin]
    if not said:
        raise BenchmarkError("the trigger changed no answer: there is no text to force.")
    return watched.read_forced(rows, [rng.choice(said) for _ in rows], "forced text")
