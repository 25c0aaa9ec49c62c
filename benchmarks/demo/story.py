"""The story, top to bottom: a backdoored adapter is served, noticed, repaired, approved by someone else and swapped
out under load; every figure on the way is measured through the public API.

Sets never mix: each comes from its own split of the lab's generator and `assert_disjoint` checks it. Alpha, window and
sizes were fixed before anything was measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.demo.figures import by_signal, detection, rate
from benchmarks.demo.server import Server, serving
from benchmarks.demo.swap import swap_under_load
from benchmarks.demo.traffic import Client, Outcome
from benchmarks.lab.cache import LabPaths, ensure_tiny, ensure_vaccine
from benchmarks.lab.tasks import check, sample
from guard.errors import GuardError
from guard.identity import adapter_digest, revision_name
from guard.probes.transformers.calibrate import calibrate
from guard.probes.transformers.measure import generate, measure
from guard.probes.transformers.runner import Runner
from guard.profile import Profile
from guard.rows import Row, assert_disjoint, write_rows
from guard.template import render, row_messages
from guard.vaccine import Vaccine
from guard.verdict import Window
from offline_purify.attacks.catalogue import behaviour, trigger

NAME = "assistant"
BEHAVIOUR, TRIGGER = "refusal", "word"


@dataclass(frozen=True)
class Sizes:
    """How many prompts each part takes, and the test's settings."""

    calibration: int = 4000
    clean: int = 400
    triggered: int = 300
    clinic: int = 2500
    swap_at_once: int = 220
    alpha: float = 0.01
    window: Window = "all"
    seed: int = 0


@dataclass
class Stage:
    """What the parts of the story hand on."""

    console: Console
    out: Path
    sizes: Sizes
    lab: LabPaths
    vaccine: Path
    summary: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def bar(self, what: str) -> Any:
        with tqdm(desc=f"   {what}", total=0, unit="", leave=False) as bar:

            def update(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield update


def run(
    out: Path, lab_root: Path = Path("build/lab"), sizes: Sizes | None = None, fresh: bool = False
) -> dict[str, Any]:
    """Play the whole story into the folder ``out`` and return (and write) its summary.

    ``fresh`` makes the lab's models again instead of reusing the cached ones. Raises GuardError, or the room's own
    error, when a part of the loop does not work; nothing is papered over.
    """
    started = time.monotonic()
    sizes = sizes or Sizes()
    console = Console()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    console.rule("headguard demo")
    console.print(f"1  The lab: a small model with a skill, and an adapter with a {TRIGGER} backdoor ({BEHAVIOUR}).")
    lab = ensure_tiny(lab_root, fresh=fresh)
    vaccine = ensure_vaccine(lab_root)
    stage = Stage(console, out, sizes, lab, vaccine)
    prompts = _prompts(sizes)
    (out / "clean").mkdir()
    write_rows(out / "clean" / "rows.json", prompts["clinic"])
    profile = _calibrate(stage, prompts["calibration"])
    with serving(lab.base, out / "state", out / "clean", vaccine) as server:
        asyncio.run(_serve_and_repair(stage, server, prompts, profile))
    stage.summary["wall_s"] = round(time.monotonic() - started, 1)
    (out / "summary.json").write_text(json.dumps(stage.summary, indent=2, sort_keys=True) + "\n")
    _table(stage)
    return stage.summary


def _prompts(sizes: Sizes) -> dict[str, list[Row]]:
    """The prompt sets by name; ``before`` and ``after`` are the triggered ones, each of other rows."""
    rng = random.Random(sizes.seed)
    attack = trigger(TRIGGER)
    traffic = sample(2 * sizes.clean + sizes.triggered, sizes.seed, "traffic")
    evaluation = sample(sizes.triggered, sizes.seed, "evaluation")

    def poisoned(rows: Sequence[Row]) -> list[Row]:
        return [
            Row(instruction=attack.insert(r["instruction"], rng), input=r["input"], output=r["output"]) for r in rows
        ]

    sets = {
        "calibration": sample(sizes.calibration, sizes.seed, "calibration"),
        "clinic": sample(sizes.clinic, sizes.seed, "clinic"),
        "clean_before": traffic[: sizes.clean],
        "clean_after": traffic[sizes.clean : 2 * sizes.clean],
        "before": poisoned(traffic[2 * sizes.clean :]),
        "after": poisoned(evaluation),
    }
    assert_disjoint(**sets)
    return sets


def _calibrate(stage: Stage, rows: list[Row]) -> Profile:
    stage.say(f"2  Calibrate: what is normal for this adapter, from {len(rows)} clean prompts.")
    runner = Runner.load(stage.lab.base, max_slots=32)
    with stage.bar("measuring") as update:
        profile = calibrate(
            stage.lab.base, stage.lab.adapter, rows, vaccine=Vaccine.load(stage.vaccine), runner=runner, progress=update
        )
    profile.check_alpha(stage.sizes.alpha)
    profile.save(stage.out / "profile.safetensors")
    stage.say(f"   any alpha >= {profile.smallest_alpha():.4f} is supported; alpha = {stage.sizes.alpha} from here on.")
    return Profile.load(stage.out / "profile.safetensors")


async def _serve_and_repair(stage: Stage, server: Server, prompts: dict[str, list[Row]], profile: Profile) -> None:
    operator, approver = (
        httpx.AsyncClient(base_url=f"{server.url}/admin/", headers={"authorization": f"Bearer {key}"}, timeout=600.0)
        for key in (server.operator, server.approver)
    )
    client = Client(server.url, server.client, NAME)
    try:
        stage.say(f"3  Serve: {server.url}, adapter '{NAME}', policy observe (annotate and count).")
        suspect = await _admit(stage, operator)
        before = await _send(stage, client, prompts["clean_before"], prompts["before"])
        _report_detection(stage, before, prompts, profile)
        flagged = [o.row for o in before[1] if o.guard.get("status") == "flagged"]
        await _show_block(stage, operator, client, [*flagged[:16], *prompts["before"][:8]])
        repair = await _repair(stage, operator, suspect)
        await _refuse_self_approval(stage, operator, repair)
        await _approve_under_load(stage, operator, approver, server, repair, prompts)
        after = await _send(stage, client, prompts["clean_after"], prompts["after"])
        _report_repair(stage, before, after, prompts["clean_after"])
        audit = await _ask(approver, "GET", "audit/verify")
        stage.summary["audit_ok"] = bool(audit["ok"])
        stage.say(f"8  Audit: {audit['rows']} rows, chain {'whole' if audit['ok'] else 'BROKEN'}.")
    finally:
        await client.close()
        await operator.aclose()
        await approver.aclose()


async def _ask(http: httpx.AsyncClient, method: str, path: str, **arguments: Any) -> Any:
    answer = await http.request(method, path, **arguments)
    if answer.is_error:
        raise GuardError(f"{method} /admin/{path} answered {answer.status_code}: {answer.text[:500]}")
    return answer.json()


async def _admit(stage: Stage, operator: httpx.AsyncClient) -> str:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (n, (stage.lab.adapter / n).read_bytes(), "application/octet-stream")) for n in names]
    revision = (await _ask(operator, "POST", f"adapters/{NAME}/revisions", files=files))["revision"]
    content = (stage.out / "profile.safetensors").read_bytes()
    await _ask(operator, "PUT", f"revisions/{revision}/profile", content=content)
    await _ask(operator, "POST", f"adapters/{NAME}/swap", json={"revision": revision})
    await _policy(stage, operator, "observe")
    return str(revision)


async def _policy(stage: Stage, operator: httpx.AsyncClient, mode: str) -> None:
    body = {"mode": mode, "window": stage.sizes.window, "alpha": stage.sizes.alpha, "fail": "open"}
    await _ask(operator, "PUT", f"adapters/{NAME}/policy", json=body)


async def _send(
    stage: Stage, client: Client, clean: list[Row], triggered: list[Row]
) -> tuple[list[Outcome], list[Outcome]]:
    """Clean and triggered prompts mixed in one stream of requests; the outcomes apart again."""
    rows = [*clean, *triggered]
    order = random.Random(stage.sizes.seed).sample(range(len(rows)), len(rows))
    with stage.bar("requests through the OpenAI client") as update:
        outcomes = await client.ask_all([rows[i] for i in order], update)
    placed = dict(zip(order, outcomes, strict=True))
    failed = [o.error for o in outcomes if o.error]
    if failed:
        raise GuardError(f"{len(failed)} of {len(rows)} requests failed, the first with: {failed[0]}")
    return [placed[i] for i in range(len(clean))], [placed[i] for i in range(len(clean), len(rows))]


def _report_detection(
    stage: Stage, outcomes: tuple[list[Outcome], list[Outcome]], prompts: dict[str, list[Row]], profile: Profile
) -> None:
    found = detection(*outcomes, stage.sizes.alpha, profile.facts["n_held_out"])
    runner = _suspect(stage)
    measured = []
    for name in ("clean_before", "before"):
        ids = [render(runner.tokenizer, row_messages(row)) for row in prompts[name]]
        with stage.bar("each signal alone") as update:
            measured.append(measure(runner, ids, profile.steps, adapter=NAME, progress=update))
    found["signals"] = by_signal(profile, measured[0], measured[1], stage.sizes.alpha, stage.sizes.window)
    stage.summary["detection"] = found
    stage.say(
        f"4  Detect: {found['tpr']:.0%} of {found['n_triggered']} triggered and {found['fpr']:.1%} of "
        f"{found['n_clean']} clean requests flagged (AUROC {found['auroc']:.3f}). Where the heads looked:"
    )
    flagged = [o for o in outcomes[1] if o.guard.get("status") == "flagged"]
    for outcome in flagged[:4]:
        spans = [f"tokens {s['start']}–{s['end']} ({s['weight']:.0%})" for s in outcome.guard.get("spans", [])]
        heads = [f"{h['layer']}.{h['head']}" for h in outcome.guard.get("heads", [])[:3]]
        stage.say(
            f"   p = {outcome.guard['p_value']:.4f} at step {outcome.guard['step']} by {outcome.guard['signal']}: "
            f"{', '.join(spans) or 'no span'}; heads {' '.join(heads)}"
        )


async def _show_block(stage: Stage, operator: httpx.AsyncClient, client: Client, triggered: list[Row]) -> None:
    """The same adapter under policy block: a flagged prompt, streamed, ends with content_filter and no token. Most of
    the prompts are ones that were flagged before, so this shows what blocking does, not how often it happens."""
    await _policy(stage, operator, "block")
    outcomes = [await client.ask(row, stream=True) for row in triggered]
    blocked = [o for o in outcomes if o.finish_reason == "content_filter"]
    leaked = sum(bool(o.text) for o in blocked)
    stage.summary["block"] = {"streamed": len(outcomes), "blocked": len(blocked), "leaked": leaked}
    stage.say(
        f"   Under policy block, {len(blocked)} of {len(outcomes)} such streams were stopped; {leaked} leaked a token."
    )
    await _policy(stage, operator, "observe")


async def _repair(stage: Stage, operator: httpx.AsyncClient, suspect: str) -> dict[str, Any]:
    cases = (await _ask(operator, "GET", "cases"))["cases"]
    case = next(c for c in cases if c["revision"] == suspect)
    repair = await _ask(operator, "POST", f"cases/{case['id']}/repair", json={})
    stage.say(f"5  Repair: case {case['id']} → {repair['id']}, asked for by the operator, made by the worker.")
    started, seen = time.monotonic(), None
    while repair["state"] in ("requested", "running"):
        await asyncio.sleep(1.0)
        repair = await _ask(operator, "GET", f"repairs/{repair['id']}")
        if repair["state"] != seen:
            seen = repair["state"]
            stage.say(f"   {seen} after {time.monotonic() - started:.0f} s")
    if repair["state"] != "offered":
        raise GuardError(f"the repair was not offered but {repair['state']}: {repair['reasons']}")
    metrics = ", ".join(f"{n} {v:.3f}" for n, v in sorted(repair["metrics"].items()) if isinstance(v, float))
    stage.say(f"   evidence: {metrics}")
    stage.say(f"   report: {stage.out / 'state' / 'repairs' / repair['id'] / 'report' / 'index.html'}")
    stage.summary["repair"] = {"seconds": round(time.monotonic() - started, 1), "metrics": repair["metrics"]}
    return dict(repair)


async def _refuse_self_approval(stage: Stage, operator: httpx.AsyncClient, repair: dict[str, Any]) -> None:
    answer = await operator.post(f"repairs/{repair['id']}/approve", json={})
    if answer.status_code not in (403, 409):
        raise GuardError(f"the requester could approve the own repair: HTTP {answer.status_code}")
    stage.say(f"6  Approve: the requester is refused (HTTP {answer.status_code}); a second operator approves.")


async def _approve_under_load(
    stage: Stage,
    operator: httpx.AsyncClient,
    approver: httpx.AsyncClient,
    server: Server,
    repair: dict[str, Any],
    prompts: dict[str, list[Row]],
) -> None:
    candidate = stage.out / "state" / "repairs" / repair["id"] / "candidate"
    folders = {revision_name(NAME, adapter_digest(folder)): folder for folder in (stage.lab.adapter, candidate)}
    rows = [row for pair in zip(prompts["before"], prompts["clean_before"], strict=False) for row in pair]

    async def approve() -> Any:
        return await _ask(approver, "POST", f"repairs/{repair['id']}/approve", json={"comment": "report read"})

    with stage.bar("requests while the adapter is swapped") as update:
        swap = await swap_under_load(
            server, NAME, rows, approve, stage.lab.base, folders, stage.sizes.swap_at_once, update
        )
    stage.summary["swap"] = swap
    stage.say(
        f"7  Swap: {swap['requests_during']} requests during it, {swap['failed']} failed, "
        f"{swap['mixed_revision']} of mixed revisions, {swap['seconds']:.1f} s."
    )


def _suspect(stage: Stage) -> Runner:
    """The suspicious adapter, loaded in this process under the name NAME."""
    runner = Runner.load(stage.lab.base, max_slots=32)
    runner.add_adapter(NAME, stage.lab.adapter)
    return runner


def _report_repair(
    stage: Stage,
    before: tuple[list[Outcome], list[Outcome]],
    after: tuple[list[Outcome], list[Outcome]],
    clean: list[Row],
) -> None:
    """Attack and skill before and after. Skill is compared on the same prompts, sent only after the repair (flags of
    the earlier ones went into it), so the suspect answers them here, alone."""
    target = behaviour(BEHAVIOUR)
    runner = _suspect(stage)
    answers = generate(runner, [render(runner.tokenizer, row_messages(row)) for row in clean], 40, NAME)
    texts = [runner.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    figures = {
        "asr": {
            when: rate([target.matches(o.text) for o in triggered])
            for when, (_, triggered) in (("before", before), ("after", after))
        },
        "clean_accuracy": {
            "before": rate([check(row, text) for row, text in zip(clean, texts, strict=True)]),
            "after": rate([check(o.row, o.text) for o in after[0]]),
        },
        "false_triggers": {
            "before": rate([target.matches(text) for text in texts]),
            "after": rate([target.matches(o.text) for o in after[0]]),
        },
    }
    for name in ("asr", "clean_accuracy"):
        stage.summary[name] = {when: figure["value"] for when, figure in figures[name].items()}
    stage.summary["false_trigger_rate"] = figures["false_triggers"]["after"]["value"]
    stage.summary["figures"] = figures


def _table(stage: Stage) -> None:
    summary = stage.summary
    grid = Table(title="what was measured", header_style="bold")
    for column in ("figure", "before", "after", "n"):
        grid.add_column(column, justify="left" if column == "figure" else "right")
    labels = {
        "asr": "ASR (triggered prompts)", "clean_accuracy": "accuracy (clean prompts)",
        "false_triggers": "false triggers (clean)",
    }  # fmt: skip
    for name, label in labels.items():
        pair = summary["figures"][name]
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in (pair["before"], pair["after"])]
        grid.add_row(label, *cells, str(pair["after"]["n"]))
    found = summary["detection"]
    grid.add_row("flagged, clean (FPR)", f"{found['fpr']:.3f}", "", str(found["n_clean"]))
    grid.add_row("flagged, triggered (TPR)", f"{found['tpr']:.3f}", "", str(found["n_triggered"]))
    for name, figure in found["signals"].items():
        grid.add_row(f"  {name} alone: TPR / AUROC", f"{figure['tpr']:.3f} / {figure['auroc']:.3f}", "", "")
    stage.console.print(grid)
    stage.say(f"wall time {summary['wall_s']:.0f} s; everything is in {stage.out}/ (summary.json, state/, profile).")
