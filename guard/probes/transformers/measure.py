"""Many prompts through a runner: what the guard reads at its checkpoints, and plain greedy answers.

Calibration, repair and evaluation all need the same loop: keep every slot busy, decode greedily, take a prompt's slot
back when it ends. `measure` also reads the bank at the checkpoints, with the step semantics of the serving engine
(step 0 is the row of the last prompt position; step t also holds the rows of the first t generated tokens);
`generate` does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from guard.gram import HeadSums
from guard.probes.transformers.runner import Runner
from guard.readings import CHECKPOINTS, Measurement, Readings

# Called with (prompts finished, prompts in all).
Progress = Callable[[int, int], None]
# By checkpoint: prompt number, what its slot held, log-probabilities (nats) of the tokens so far.
Taken = dict[int, list[tuple[int, HeadSums, list[float]]]]


@dataclass
class _Track:
    """One prompt on its way: tokens generated so far, their log-probabilities (nats)."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.tokens) - 1


def measure(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    checkpoints: Sequence[int] = CHECKPOINTS,
    max_new_tokens: int | None = None,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Greedy answers to `prompts` (token ids each) with the guard's readings at `checkpoints`.

    max_new_tokens defaults to what the last checkpoint needs. Answers are without the end-of-sequence token; a prompt
    is in the readings of a checkpoint only if it got that far. Raises PromptTooLong, before anything runs, if a
    prompt does not fit, GuardError if one is empty.
    """
    steps = sorted(set(checkpoints))
    limit = steps[-1] + 1 if max_new_tokens is None else max_new_tokens
    taken: Taken = {step: [] for step in steps}
    answers: list[list[int]] = [[] for _ in prompts]
    for slot, track, ended in _greedy(runner, prompts, limit, adapter, steps[-1], progress):
        if track.step in taken:
            taken[track.step].append((track.index, runner.bank.read(slot, track.step), list(track.logprobs)))
        if ended:
            answers[track.index] = _without_end(runner, track.tokens)
    return collect(runner, prompts, answers, taken)


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy answers (token ids, end-of-sequence stripped) to `prompts`, in their order. The probe does not look."""
    answers: list[list[int]] = [[] for _ in prompts]
    for _, track, ended in _greedy(runner, prompts, max_new_tokens, adapter, -1, progress):
        if ended:
            answers[track.index] = _without_end(runner, track.tokens)
    return answers


def _greedy(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    limit: int,
    adapter: str | None,
    last_step: int,
    progress: Progress | None,
) -> Iterator[tuple[int, _Track, bool]]:
    """Yields (slot, track, ended) after every sampled token; the bank then holds rows up to track.step or
    last_step.
    """
    for prompt in prompts:
        runner.check_prompt(prompt)
    # Longest first: prompts that are prefilled together have like lengths, so little of the batch is padding.
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    free = list(range(runner.max_slots))
    running: dict[int, _Track] = {}
    finished = 0
    try:
        while waiting or running:
            # Prefill in groups: one prompt at a time would leave the machine idle between small forwards.
            if waiting and (not running or len(free) >= max(1, runner.max_slots // 4)):
                group = [(free.pop(0), _Track(waiting.pop())) for _ in range(min(len(free), len(waiting)))]
                running.update(group)
                logits = runner.prefill(
                    [slot for slot, _ in group],
                    [prompts[track.index] for _, track in group],
                    [adapter] * len(group),
                    [last_step >= 0] * len(group),
                )
            else:
                group = sorted(running.items())
                logits = runner.decode(
                    [slot for slot, _ in group],
                    [track.tokens[-1] for _, track in group],
                    [adapter] * len(group),
                    [track.step < last_step for _, track in group],
                )
            chosen, logprobs = _pick(logits)
            for (slot, track), token, logprob in zip(group, chosen, logprobs, strict=True):
                track.tokens.append(token)
                track.logprobs.append(logprob)
                full = len(prompts[track.index]) + len(track.tokens) >= runner.max_len
                ended = token in runner.eos_ids or len(track.tokens) >= limit or full
                yield slot, track, ended
                if ended:
                    del running[slot]
                    free.append(slot)
                    free.sort()
                    finished += 1
                    if progress is not None:
                        progress(finished, len(prompts))
    finally:
        for slot in running:
            runner.free(slot)


def _pick(logits: Tensor) -> tuple[list[int], list[float]]:
    """Greedy tokens of logits [N, V] and their log-probabilities (nats)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    best = logprobs.argmax(dim=-1, keepdim=True)
    return best[:, 0].tolist(), logprobs.gather(1, best)[:, 0].tolist()


def _without_end(runner: Runner, tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in runner.eos_ids else list(tokens)


def collect(
    runner: Runner, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], taken: Taken
) -> Measurement:
    """What was read of prompts and their answers (token ids each) at checkpoints, in any order, as a Measurement."""
    shape = runner.shape
    at = {
        step: Readings.together(step, (shape.layers, shape.heads, shape.kv_heads), sorted(rows, key=lambda row: row[0]))
        for step, rows in taken.items()
    }
    return Measurement(np.asarray([len(p) for p in prompts], dtype=np.int64), [list(a) for a in answers], at)
