"""One request over one step: the token is taken, the guard looks, and what the client may have is said.

The order is the point. The detector is asked before the step's token is released, so an answer that is flagged (and is
to be stopped) ends without it; a verdict that cannot be had is `unscored` with a reason, never clean.
"""

from __future__ import annotations

import time
from typing import Any

from guard.probes.transformers.runner import Runner
from guard.readings import Reading
from guard.verdict import unscored
from serving.engines.annotations import with_text
from serving.engines.embedded.requests import Event, Failed, Finished, FinishReason, GuardUpdate, Job, Token
from serving.engines.embedded.sampling import Choice
from serving.errors import ServingError


class EngineFault(ServingError):
    """The engine failed at this request; the others go on."""

    status, type, code = 500, "server_error", "engine_fault"


def advance(job: Job, choice: Choice, runner: Runner, decoder: Any) -> tuple[list[Event], bool]:
    """Takes `job` over the step that has just been computed. Returns its events and whether it is over.

    decoder: the tokenizer that turns prompt ids into the text of focus spans.
    """
    job.tokens.append(choice.token)
    job.logprobs.append(choice.logprob)
    if not choice.finite:
        return [Failed(EngineFault("the model's output was not finite.", code="non_finite_output"))], True
    events: list[Event] = []
    began = time.perf_counter()
    if _observe(job, runner, decoder):
        events.append(GuardUpdate(job.verdict, time.perf_counter() - began))
    elif job.step == 0:
        events.append(GuardUpdate(job.verdict))
    watch, verdict = job.request.watch, job.verdict
    blind = verdict.status == "unscored" and job.settled
    if (verdict.status == "flagged" and watch.stop) or (blind and watch.fail_closed):
        return _finish(job, events, "content_filter", decoder)
    if choice.token in runner.eos_ids:
        return _finish(job, events, "stop", decoder)
    job.released += 1
    events.append(Token(choice.token, job.stops.push(job.detokenizer.push(choice.token))))
    if job.stops.hit:
        return _finish(job, events, "stop", decoder)
    if len(job.tokens) >= job.limit:
        return _finish(job, events, "length", decoder)
    return events, False


def _observe(job: Job, runner: Runner, decoder: Any) -> bool:
    """Asks the detector if this step is a checkpoint. Returns whether the verdict is news."""
    detector, track, step = job.detector, job.track, job.step
    if detector is None or track is None or job.settled or step not in detector.checkpoints:
        return False
    if not runner.bank.complete(job.slot, step + 1):
        job.blind = job.settled = True
        before = job.verdict
        job.verdict = unscored(
            "probe_blind", alpha=before.alpha, window=before.window, step=step, profile=before.profile
        )
        return True
    reading = Reading.of(step, runner.bank.read(job.slot, step), job.logprobs)
    job.verdict = with_text(detector.observe(track, reading), job.request.prompt, decoder)
    job.settled = job.verdict.final
    return True


def _finish(job: Job, events: list[Event], reason: FinishReason, decoder: Any) -> tuple[list[Event], bool]:
    """Ends a job in order: its final verdict, then its end."""
    if job.detector is not None and job.track is not None and not job.settled:
        job.verdict = with_text(job.detector.close(job.track), job.request.prompt, decoder)
    text = "" if reason == "content_filter" else job.stops.push(job.detokenizer.flush()) + job.stops.flush()
    last = job.verdict.closed()
    said = events[-1] if events else None
    if not isinstance(said, GuardUpdate) or said.verdict != last:
        events.append(GuardUpdate(last))
    events.append(Finished(reason, text, len(job.request.prompt), job.released))
    return events, True
