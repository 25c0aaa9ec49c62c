"""The repair from end to end, as a plan of steps that any executor can run: here at once, in ``workflow`` durably.

    prepare -> answer -> candidates -> signature -> each stage alone -> (together, if needed) -> controls
            -> evaluate all -> gate -> candidate -> calibrate -> report

The plan is a generator: it yields (name, function), is sent what the function returned, and decides the next step from
that alone, so a durable executor that replays recorded results walks the same path. Of the pipelines that pass the gate
the simplest is offered; one that fails it is never saved as a candidate. Adapters and whole models walk the same plan;
only where nobody is trusted is no reference evaluated, and where nothing stands in for one nothing is repaired.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

from guard.adapters import inspect_adapter
from guard.errors import GuardError, RowsError
from guard.rows import read_rows
from offline_purify.evaluation import figures
from offline_purify.flags import read_flags
from offline_purify.full_model import check_model
from offline_purify.gate import GateResult, judge
from offline_purify.report import write_report
from offline_purify.spec import RepairResult, RepairSpec
from offline_purify.stage import NO_REFERENCE
from offline_purify.steps import RepairSteps, read_json, write_json
from offline_purify.suspect import check_repairable

Step = tuple[str, Callable[[], dict[str, Any]]]
Plan = Generator[Step, dict[str, Any], dict[str, Any]]
CONTROLS = ("clean_only", "random_channels", "random_heads")


def check_inputs(spec: RepairSpec) -> None:
    """Raise UnsupportedModel, AdapterRejected or RowsError for input that no repair can start from; loads no
    weights."""
    if spec.adapter is None:
        check_model(spec.base, spec.reference_folder)
    else:
        check_repairable(spec.base)
        inspect_adapter(spec.adapter, spec.base)
        if spec.reference_folder is not None:
            inspect_adapter(spec.reference_folder, spec.base)
    read_flags(spec.flags)
    rows = read_rows(spec.clean)
    if not any(r["output"].strip() for r in rows):
        raise RowsError(f"{spec.clean}: no row has an output; clean rows need the answers that must be kept.")


def gate_of(steps: RepairSteps, label: str) -> GateResult:
    """The gate's decision on state ``label``, from the sittings on disk."""
    confirmed = any(c["fired"] >= 0.5 * c["tried"] > 0 for c in read_json(steps.spec.work / "candidates.json"))
    return judge(figures(steps.sitting("before"), steps.sitting(label)), steps.spec.gate, candidates=confirmed)


def passes(steps: RepairSteps, label: str) -> dict[str, Any]:
    """Whether state ``label`` passes the gate, as a step's result."""
    return {"passed": gate_of(steps, label).passed}


def choose(steps: RepairSteps, labels: list[str]) -> dict[str, Any]:
    """Gate every repaired state; pick the simplest that passes (fewest stages, then fewest fires, then least lost)."""
    passing: list[tuple[tuple[float, ...], str]] = []
    outcomes: dict[str, Any] = {}
    before = steps.sitting("before")
    for label in labels:
        gate = gate_of(steps, label)
        outcomes[label] = gate.model_dump()
        if gate.passed:
            found = figures(before, steps.sitting(label))
            values = [
                f.value if (f := found[name]) is not None else 0.0
                for name in ("flagged_asr", "candidate_asr", "accuracy_drop", "perplexity_ratio")
            ]
            passing.append(((label.count("+"), values[0] + values[1], values[2], values[3]), label))
    chosen = min(passing)[1] if passing else None
    write_json(steps.spec.work / "gates.json", {"gates": outcomes, "chosen": chosen})
    return {"chosen": chosen, "passed": [label for _, label in passing]}


def plan(steps: RepairSteps) -> Plan:
    """The steps of one repair, in order; returns {"status", "reasons", "chosen", "labels", …}."""
    spec = steps.spec
    prepared = yield "prepare", steps.prepare
    kinds = yield "answer", steps.answer
    yield "candidates", steps.candidates
    yield "evaluate before", partial(steps.evaluate, "before")
    if spec.has_reference:
        yield "evaluate reference", partial(steps.evaluate, "reference")
    outcome: dict[str, Any] = {"chosen": None, "repaired": [], "controls": [], "stages": [], "calibration": None}
    if not spec.has_reference and kinds["references"] == "none":
        return outcome | {"status": "refused", "reasons": [NO_REFERENCE]}
    if kinds["true"] == 0:
        flags = prepared["flags_train"] + prepared["flags_heldout"]
        reason = (
            f"nothing to repair: of {flags} flags, {kinds['false_alarm']} are answered as the reference answers and "
            f"{kinds['odd']} differ in ways that do not recur"
        )
        return outcome | {"status": "refused", "reasons": [reason]}
    passed = False
    stages = list(spec.stages)
    if "signature" in stages:
        found = yield "signature", steps.signature
        if not found["ok"]:
            outcome["stages"].append(found)
            stages.remove("signature")
    for name in stages:
        done = yield f"stage {name}", partial(steps.stage, name)
        outcome["stages"].append(done)
        if done["ok"]:
            yield f"evaluate {name}", partial(steps.evaluate, name)
            outcome["repaired"].append(name)
            judged = yield f"gate {name}", partial(passes, steps, name)
            passed = passed or judged["passed"]
    if not passed and len(stages) > 1:
        first, *others = stages
        start = first if first in outcome["repaired"] else None
        for name in others:
            if start is None:
                break
            done = yield f"stage {start}+{name}", partial(steps.stage, name, start)
            outcome["stages"].append(done)
            if not done["ok"]:
                break
            start = done["label"]
            yield f"evaluate {start}", partial(steps.evaluate, start)
            outcome["repaired"].append(start)
    if spec.controls:
        for name in CONTROLS:
            done = yield f"control {name}", partial(steps.control, name)
            if done["ok"]:
                yield f"evaluate {done['label']}", partial(steps.evaluate, done["label"])
                outcome["controls"].append(done["label"])
    if not outcome["repaired"]:
        outcome |= {"status": "failed", "reasons": [f"{d['label']}: {d['reason']}" for d in outcome["stages"]]}
        return outcome
    chosen = (yield "gate", partial(choose, steps, outcome["repaired"]))["chosen"]
    if chosen is None:
        reasons = [f"{label}: {r}" for label in outcome["repaired"] for r in gate_of(steps, label).reasons]
        outcome |= {"status": "refused", "reasons": reasons}
        return outcome
    saved = yield "candidate", partial(steps.save_candidate, chosen)
    outcome |= {"status": "offered", "reasons": [], "chosen": chosen, **saved}
    if spec.calibrate:
        outcome["calibration"] = yield "calibrate", steps.calibrate
    return outcome


def finish(steps: RepairSteps, outcome: dict[str, Any], seconds: float) -> RepairResult:
    """Write the report and ``result.json``, and remove the working folder unless it is to be kept."""
    spec = steps.spec
    summary = write_report(steps, outcome, seconds)
    gate = gate_of(steps, outcome["chosen"]) if outcome["chosen"] else None
    if gate is None and outcome["repaired"]:
        gate = gate_of(steps, outcome["repaired"][-1])
    calibration = outcome.get("calibration")
    result = RepairResult(
        status=outcome["status"],
        reasons=outcome["reasons"],
        revision=outcome.get("revision"),
        pipeline=outcome["chosen"].split("+") if outcome["chosen"] else [],
        candidate=outcome.get("candidate"),
        profile=calibration["profile"] if calibration else None,
        report=str(spec.out / "report" / "index.html"),
        gate=gate,
        summary=summary,
        seconds=round(seconds, 1),
    )
    write_json(spec.out / "result.json", result.model_dump(mode="json"))
    steps.close()
    if not spec.keep_work:
        shutil.rmtree(spec.work, ignore_errors=True)
    return result


def failed(spec: RepairSpec, error: GuardError, seconds: float) -> RepairResult:
    """The result of a repair that an error of the data stopped half-way."""
    result = RepairResult(status="failed", reasons=[f"{type(error).__name__}: {error}"], seconds=round(seconds, 1))
    spec.out.mkdir(parents=True, exist_ok=True)
    write_json(spec.out / "result.json", result.model_dump(mode="json"))
    return result


def purify(spec: RepairSpec, progress: Callable[[str, int, int], None] | None = None) -> RepairResult:
    """Run the whole repair in this process, without durability.

    Raises UnsupportedModel, AdapterRejected or RowsError before any work; an error of the data met later ends the
    repair as ``failed`` with its message.
    """
    check_inputs(spec)
    began = time.monotonic()
    steps = RepairSteps(spec, progress)
    walk = plan(steps)
    try:
        _, step = next(walk)
        while True:
            try:
                _, step = walk.send(step())
            except StopIteration as end:
                return finish(steps, end.value, time.monotonic() - began)
    except GuardError as error:
        return failed(spec, error, time.monotonic() - began)
    finally:
        walk.close()
        steps.close()


def read_result(out: Path) -> RepairResult:
    """The result a finished repair left in its output folder."""
    return RepairResult.model_validate(read_json(Path(out) / "result.json"))
