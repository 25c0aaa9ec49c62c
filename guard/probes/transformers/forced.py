"""Given answers read as if the model had chosen them: the control that tells a trigger from the text it causes.

A statistic over generated rows may see the words of an answer and nothing else (reference/lab-findings.md §3b). So
clean prompts are followed by the very answers that a trigger brings about, fed token by token, and the guard reads at
its checkpoints just as it would have while those tokens were sampled.

A forced token is one that the model would hardly have chosen, so its own log-probability says that it was forced and
nothing else. What a model that had a reason to say it would have shown cannot be known; the log-probability of the
model's own choice at each place is what the text alone leaves of its certainty, and is the default.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from guard.errors import GuardError
from guard.probes.transformers.measure import Progress, Taken, collect
from guard.probes.transformers.runner import Runner
from guard.readings import CHECKPOINTS, Measurement


def measure_forced(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    checkpoints: Sequence[int] = CHECKPOINTS,
    adapter: str | None = None,
    progress: Progress | None = None,
    as_sampled: bool = False,
) -> Measurement:
    """The guard's readings at `checkpoints` while `answers` (token ids, end-of-sequence included where there is one)
    are fed after `prompts` (token ids), pair by pair.

    Log-probabilities (nats) are those of the model's own choice at each place, or with ``as_sampled`` of the forced
    tokens. An answer is cut where the context ends. Raises GuardError for an empty prompt or answer, or lists of
    different lengths; PromptTooLong if a prompt does not fit.
    """
    if len(prompts) != len(answers):
        raise GuardError(f"{len(prompts)} prompts and {len(answers)} answers were given; expected one answer each.")
    if not all(answers):
        raise GuardError("an answer to force has no tokens: the end-of-sequence token at least is expected.")
    for prompt in prompts:
        runner.check_prompt(prompt)
    steps = sorted(set(checkpoints))
    taken: Taken = {step: [] for step in steps}
    cut = [list(a[: runner.max_len - len(p) + 1]) for p, a in zip(prompts, answers, strict=True)]
    # Answers of like length together: a batch runs until its longest answer ends.
    order = sorted(range(len(prompts)), key=lambda i: (len(cut[i]), len(prompts[i])))
    for start in range(0, len(order), runner.max_slots):
        group = order[start : start + runner.max_slots]
        try:
            _force(runner, group, prompts, cut, steps[-1], adapter, as_sampled, taken)
        finally:
            for slot in range(len(group)):
                runner.free(slot)
        if progress is not None:
            progress(start + len(group), len(order))
    return collect(runner, prompts, cut, taken)


def _force(
    runner: Runner,
    group: Sequence[int],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    last_step: int,
    adapter: str | None,
    as_sampled: bool,
    taken: Taken,
) -> None:
    """One batch, request i of the group in slot i, until every answer has ended or nothing more is read."""
    slots = list(range(len(group)))
    logprobs: list[list[float]] = [[] for _ in slots]
    logits = runner.prefill(slots, [prompts[i] for i in group], [adapter] * len(slots))
    for step in range(last_step + 1):
        chances = torch.log_softmax(logits, dim=-1)
        for row, slot in enumerate(slots):
            chosen = chances[row, answers[group[slot]][step]] if as_sampled else chances[row].max()
            logprobs[slot].append(float(chosen))
            if step in taken:
                taken[step].append((group[slot], runner.bank.read(slot, step), list(logprobs[slot])))
        slots = [slot for slot in slots if len(answers[group[slot]]) > step + 1]
        if not slots or step == last_step:
            return
        fed = [answers[group[slot]][step] for slot in slots]
        logits = runner.decode(slots, fed, [adapter] * len(slots))
