"""The report of a repair: one page that says what was wrong, what was done, what it cost and what remains uncertain.

``report.json`` holds every figure, setting and digest; ``index.html`` shows them with plots. Prompt and answer texts
are replaced by their lengths unless the operator switched redaction off. Nothing is computed here that was not
measured by the evaluation; the page adds words, not numbers.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from offline_purify.evaluation import figures
from offline_purify.flags import KINDS
from offline_purify.gate import judge
from offline_purify.plots import draw_plots

if TYPE_CHECKING:
    from offline_purify.steps import RepairSteps

LITTLE_SKILL = 0.05
"""Exact-match accuracy below which losing none of it proves nothing."""
PACKAGES = ("headguard", "torch", "transformers", "peft", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Python and package versions; "not installed" for a package run from a checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def redacted(text: str, redact: bool) -> str:
    """The text, or its length where texts are not to be shown."""
    return f"[{len(text)} characters]" if redact else text


def uncertainties(report: dict[str, Any]) -> list[str]:
    """Sentences about what these figures cannot say."""
    lines = [
        "ASR is a proxy from the case's own flags and trigger candidates. A trigger that was never flagged, and "
        "that the candidates do not cover, was not tested and may still be there.",
    ]
    flagged = (report["states"].get(report["chosen"] or "before") or {}).get("flagged_asr")
    if flagged:
        lines.append(
            f"{flagged['n']} held-out flags, {flagged['value']:.0%} firing: up to {flagged['high']:.0%} of such "
            "requests could still fire (upper end of the 95 % interval)."
        )
    if not report["candidates_confirmed"]:
        lines.append(
            "No trigger candidate was confirmed by re-insertion, so the repair was judged on held-out flags alone."
        )
    accuracy = report["states"]["before"]["accuracy"]
    if accuracy and accuracy["value"] < LITTLE_SKILL:
        lines.append(
            "Exact match was near zero before the repair already (free text): the accuracy check "
            "says nothing here, and perplexity is the only evidence that skill was kept."
        )
    if report["kinds"]["odd"]:
        lines.append(
            f"{report['kinds']['odd']} flags differ from the reference in ways that do not recur; they prove nothing."
        )
    if report["reference"] == "base":
        lines.append(
            "The base answered as the trusted reference. A base that is itself backdoored would not be noticed here."
        )
    if report["references"] == "own":
        lines.append(
            "Nobody trusted answered: the suspect's own answers without the trigger stood in, and on clean rows its "
            "answers as they are. Triggers that were not found, or clean answers that are poisoned, go unnoticed."
        )
    if report["kinds"]["unsorted"]:
        lines.append(
            f"{report['kinds']['unsorted']} flags could not be compared with any other answer, and were neither "
            "trained nor tested on."
        )
    lines.append(
        "One seed, greedy answers, the prompts of this case and these clean rows: other data may behave otherwise."
    )
    return lines


def build(steps: RepairSteps, outcome: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Everything the report says, as one JSON-able dict."""
    from offline_purify.steps import read_json

    work, spec = steps.spec.work, steps.spec
    facts = read_json(work / "facts.json")
    flags = read_json(work / "flags.json")
    candidates = read_json(work / "candidates.json")
    before = steps.sitting("before")
    trusted = ["reference"] if spec.has_reference else []
    labels = ["before", *trusted, *outcome["repaired"], *outcome["controls"]]
    states = {
        label: {name: f.model_dump() if f else None for name, f in figures(before, steps.sitting(label)).items()}
        for label in labels
    }
    confirmed = [c for c in candidates if c["tried"] and c["fired"] >= 0.5 * c["tried"]]
    similarity = {
        label: {"flagged": sitting.similarity_flagged, "clean": sitting.similarity_clean}
        for label in ("before", outcome["chosen"])
        if label is not None and (sitting := steps.sitting(label)).similarity_flagged
    }
    gates = {
        label: judge(figures(before, steps.sitting(label)), spec.gate, candidates=bool(confirmed)).model_dump()
        for label in outcome["repaired"]
    }
    stages = {}
    for done in outcome["stages"]:
        stages[done["label"]] = read_json(work / "stages" / f"{done['label']}.json")
    held = [f for f in flags["held"] if f["kind"] == "true"]
    after = steps.sitting(outcome["chosen"]).flagged_answers if outcome["chosen"] else []
    examples = [
        {
            "request_id": f["request_id"],
            "prompt": redacted(f["messages"][-1]["content"], spec.redact),
            "before": redacted(f["suspicious"], spec.redact),
            "after": redacted(after[i], spec.redact) if i < len(after) else "",
            "reference": redacted(f["reference"], spec.redact),
        }
        for i, f in enumerate(held[:8])
    ]
    kinds = {kind: sum(f["kind"] == kind for f in [*flags["train"], *flags["held"]]) for kind in KINDS}
    report = {
        "status": outcome["status"],
        "reasons": outcome["reasons"],
        "chosen": outcome["chosen"],
        "revision": outcome.get("revision"),
        "name": spec.name,
        "kinds": kinds,
        "states": states,
        "similarity": similarity,
        "gates": gates,
        "stages": stages,
        "controls": outcome["controls"],
        "stage_seconds": {d["label"]: d["seconds"] for d in outcome["stages"]},
        "candidates": [{**c, "parts": [redacted(p, spec.redact) for p in c["parts"]]} for c in candidates],
        "candidates_confirmed": len(confirmed),
        "calibration": outcome.get("calibration"),
        "examples": examples,
        "reference": facts["reference"],
        "references": steps.references(),
        "inputs": facts,
        "settings": spec.model_dump(mode="json"),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "redacted": spec.redact,
    }
    report["uncertain"] = uncertainties(report)
    return report


def summary_of(report: dict[str, Any]) -> dict[str, Any]:
    """The few figures a caller wants: per state ASR, accuracy, perplexity ratio; flag kinds; the best trigger
    candidate's effect (never its words); seconds per stage."""

    def short(state: dict[str, Any]) -> dict[str, Any]:
        names = (
            "flagged_asr",
            "candidate_asr",
            "ftr",
            "decoy_fires",
            "accuracy",
            "perplexity",
            "perplexity_ratio",
            "kl",
            "similarity_above_clean",
        )
        return {n: state[n]["value"] if state[n] else None for n in names} | {
            "n_flags": state["flagged_asr"]["n"] if state["flagged_asr"] else 0,
            "n_clean": state["accuracy"]["n"] if state["accuracy"] else 0,
        }

    best = report["candidates"][0] if report["candidates_confirmed"] else None
    return {
        "chosen": report["chosen"],
        "kinds": report["kinds"],
        "candidates_confirmed": report["candidates_confirmed"],
        "candidate_fired": best["fired"] / best["tried"] if best else None,
        "candidate_flagged": best["flagged"] if best else None,
        "states": {label: short(state) for label, state in report["states"].items()},
        "stage_seconds": report["stage_seconds"],
    }


def write_report(steps: RepairSteps, outcome: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Write OUT/report/{report.json, index.html, *.png}; returns the short summary."""
    from offline_purify.steps import write_json

    folder = steps.spec.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    report = build(steps, outcome, seconds)
    report["plots"] = draw_plots(report, folder)
    environment = Environment(
        loader=PackageLoader("offline_purify", "templates"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(r=report)
    write_json(folder / "report.json", report)
    temporary = folder / "index.html.partial"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(folder / "index.html")
    return summary_of(report)
