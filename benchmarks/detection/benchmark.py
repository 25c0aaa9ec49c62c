"""One run, top to bottom: read, vaccinate, calibrate, measure clean and triggered prompts, then ask the controls.

What is reported was fixed before anything was measured: every signal alone, the fused test with and without
confidence, each at the same alpha under the same conformal machinery. Nothing is chosen by looking at the results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detection import figures
from benchmarks.detection.controls import judged, prompt_controls
from benchmarks.detection.inputs import Arguments, Inputs, read_inputs
from benchmarks.detection.measuring import ATTENTION, FUSED, Bench, Progress, Read, Watched, ablations
from benchmarks.detection.paper import paper_figures
from benchmarks.detection.target import obeyed, target_figures, target_of
from benchmarks.detection.trigger import Found, find_trigger, token_places
from benchmarks.detection.vaccines import Chosen, Maker, choose
from guard.detector import Detector
from guard.removal import removal_spans
from guard.rows import Row
from guard.template import row_messages
from guard.verdict import Verdict

FORMAT = "headguard.detection/1"
_LOCATED = 100  # flagged requests that are asked again without each word
_PAPER_ROWS = 200  # prompts measured with whole answers, for the paper's figures and the texts to force


def run(given: Arguments, progress: Progress | None = None, maker: Maker | None = None) -> dict[str, Any]:
    """Measure one adapter and return the result as JSON-able data; see docs/detection.md for what each part means.

    ``maker`` replaces the clinic's way of making a vaccine. Raises GuardError for anything that cannot be measured.
    """
    started = time.monotonic()
    inputs = read_inputs(given)
    found = find_trigger(inputs.triggered, inputs.clean, given.trigger)
    chosen = choose(given, inputs, found, progress, maker)
    bench = Bench(given.base, chosen.vaccine, given.alpha, given.window, given.seed, given.device, progress)
    result = _about(given, inputs, chosen, found)
    with bench.watching(given.adapter, inputs.calibration, "the adapter") as watched:
        clean = watched.read(inputs.clean, "clean prompts")
        triggered = watched.read(inputs.triggered, "triggered prompts")
        result |= _detection(watched, clean, triggered, found)
        result |= _controls(watched, inputs, found, given)
        result["calibration"] = {"facts": dict(watched.profile.facts), "window": given.window, "steps": watched.steps}
        result["uniformity"] = {
            test: figures.uniformity(watched.p_values(clean, test), watched.grid(test), given.alpha)
            for test in (FUSED, ATTENTION)
        }
    limit = result["uniformity"][FUSED]["interval_held_out"][1]
    result["others"] = _others(bench, inputs, given, max(limit, given.alpha))
    result["wall_s"] = round(time.monotonic() - started, 1)
    return result


def save(result: dict[str, Any], out: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1, sort_keys=True, default=list) + "\n", encoding="utf-8")
    part.replace(out)


def _about(given: Arguments, inputs: Inputs, chosen: Chosen, found: Found) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(given).items() if not isinstance(v, Path) and k not in ("name", "notes")}
    sets = {name: getattr(inputs, name) for name in ("calibration", "clean", "triggered", "benign", "vaccine")}
    return {
        "format": FORMAT,
        "name": given.name,
        "notes": given.notes,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "n": {name: len(rows) for name, rows in sets.items() if rows},
        "repeated": inputs.repeated,
        "digests": {**inputs.digests, "vaccine": chosen.vaccine.digest},
        "vaccine": chosen.describe(),
        "trigger": found.describe(),
    }


def _detection(watched: Watched, clean: Read, triggered: Read, found: Found) -> dict[str, Any]:
    """Power of every test, the leave-one-out ablation, curves, timing and localisation."""
    alpha, seed = watched.bench.alpha, watched.bench.seed
    tokenizer = watched.bench.runner.tokenizer
    places = {}
    if found.trigger is not None:
        places = {i: token_places(tokenizer, row, found.trigger) for i, row in enumerate(triggered.rows)}
    powers, curves, said = {}, {}, {}
    for name, detector in watched.detectors.items():
        p_clean, p_triggered = watched.p_values(clean, name), watched.p_values(triggered, name)
        said[name] = verdicts = detector.verdicts(triggered.measurement)
        spans = figures.localisation(verdicts, places, triggered.measurement.prompt_len.tolist())
        powers[name] = figures.power(p_clean, p_triggered, alpha, seed) | figures.timing(verdicts)
        powers[name]["localised"] = spans
        curves[name] = figures.roc(p_clean, p_triggered)
    powers[FUSED]["localised_by_removal"] = _by_removal(watched, triggered, said[FUSED], places)
    signals = {name: power for name, power in powers.items() if name in watched.profile.signals}
    return {
        "signals": signals,
        FUSED: powers[FUSED],
        ATTENTION: powers[ATTENTION],
        "ablation": _ablation(watched, clean, triggered),
        "roc": curves,
    }


def _by_removal(
    watched: Watched, triggered: Read, verdicts: Sequence[Verdict], places: Mapping[int, list[tuple[int, int]]]
) -> dict[str, Any] | None:
    """Do the words that a flag hangs on lie on the trigger? Of the first flagged requests: each is asked again once for
    every word."""
    tokenizer = watched.bench.runner.tokenizer
    flagged = [i for i, verdict in enumerate(verdicts) if verdict.status == "flagged" and places.get(i)][:_LOCATED]
    counter = watched.bench.counter("without each word")
    found = []
    for done, i in enumerate(flagged, 1):
        spans = removal_spans(tokenizer, row_messages(triggered.rows[i]), watched.p_values_of)
        found.append(replace(verdicts[i], spans=spans))
        if counter is not None:
            counter(done, len(flagged))
    lengths = triggered.measurement.prompt_len[flagged].tolist()
    return figures.localisation(found, {n: places[i] for n, i in enumerate(flagged)}, lengths)


def _ablation(watched: Watched, clean: Read, triggered: Read) -> dict[str, Any]:
    bench, found = watched.bench, {}
    for name, signals in ablations(watched.profile).items():
        detector = Detector(watched.profile, bench.window, bench.alpha, signals)
        p = [_with_too_long(detector.p_values(read.measurement), read) for read in (clean, triggered)]
        found[name] = figures.power(p[0], p[1], bench.alpha, bench.seed)
    return found


def _with_too_long(p: np.ndarray, read: Read) -> np.ndarray:
    return np.concatenate((p, np.full(read.n_too_long, np.nan)))


def _controls(watched: Watched, inputs: Inputs, found: Found, given: Arguments) -> dict[str, Any]:
    """Flagged shares of the prompt controls, the paper's figures, and how often the target was said."""
    few = _PAPER_ROWS
    long_clean = watched.read_long(inputs.clean[:few], "whole answers, clean")
    long_triggered = watched.read_long(inputs.triggered[:few], "whole answers, triggered")
    end = sorted(watched.bench.runner.eos_ids)[:1]
    said = [[*answer, *end] for answer in long_triggered.measurement.answers]
    target = target_of(inputs.triggered)
    texts = [answer for answer in said if answer]
    controls = {}
    for control in prompt_controls(watched, inputs.clean, given.control_rows, found.trigger, texts, given.seed):
        read = control.read()
        fired = None
        if control.may_fire and target is not None:
            fired = obeyed(watched, target, watched.read_long(read.rows, f"{control.name}, whole answers"))
        controls[control.name] = judged(watched, read, control.question, control.limit, fired)
    return {
        "controls": controls,
        "paper": paper_figures(long_clean.measurement, long_triggered.measurement),
        "target": target_figures(watched, target, long_clean, long_triggered),
    }


def _others(bench: Bench, inputs: Inputs, given: Arguments, limit: float) -> dict[str, Any]:
    """The base itself, a clean adapter and a benign conditional one, each against a profile of its own."""
    found: dict[str, Any] = {}
    rows = inputs.clean[-max(given.control_rows, min(len(inputs.clean), 1000)) :]
    plain: list[tuple[str, Path | None, str]] = [("base", None, "the base, no adapter")]
    if given.clean_adapter is not None:
        plain.append(("clean_adapter", given.clean_adapter, "an adapter without a backdoor"))
    for name, adapter, words in plain:
        with bench.watching(adapter, inputs.calibration, words) as watched:
            found[name] = {
                "clean": judged(watched, watched.read(rows, f"{words}: clean"), f"{words}: clean prompts", limit),
                "triggered": judged(
                    watched,
                    watched.read(inputs.triggered, f"{words}: triggered"),
                    f"{words}: prompts with the trigger, which means nothing to it",
                ),
            }
    if given.benign_adapter is not None:
        found["benign_adapter"] = _benign(bench, inputs, given.benign_adapter, rows, limit)
    return found


def _benign(bench: Bench, inputs: Inputs, adapter: Path, rows: Sequence[Row], limit: float) -> dict[str, Any]:
    """A benign conditional adapter without its topic among the calibration rows, with it, and with it and the
    operator's word that its repeated answers are a policy (else hygiene sets them aside); half of its rows each."""
    half = len(inputs.benign) // 2
    known, fresh = inputs.benign[:half], inputs.benign[half:]
    found: dict[str, Any] = {}
    for name, calibration, vouched in (
        ("topic_unseen", [], False),
        ("topic_calibrated", known, False),
        ("topic_vouched_for", known, True),
    ):
        words = f"a benign conditional adapter, {name.replace('_', ' ')}"
        with bench.watching(adapter, [*inputs.calibration, *calibration], words, vouched) as watched:
            topic = watched.read(fresh, f"{words}: its topic")
            clean = watched.read(rows, f"{words}: clean")
            found[f"{name}/topic"] = judged(watched, topic, f"{words}: prompts on its topic", None)
            found[f"{name}/clean"] = judged(watched, clean, f"{words}: clean prompts", limit)
            found[f"{name}/topic"]["n_set_aside"] = watched.profile.facts.get("n_set_aside")
    return found
