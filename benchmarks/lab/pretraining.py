"""Training a lab base from nothing: answers-only loss, batches of equal token counts, Muon and AdamW, one cosine.

The loop works on `benchmarks.lab.decoder.Decoder`. Right answers are counted without generating anything: when every
answer token is the most likely one given the true prefix, greedy decoding gives exactly that answer.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.lab.decoder import Decoder
from benchmarks.lab.muon import StackedMuon
from offline_purify.train import Example, Progress


@dataclass(frozen=True)
class Recipe:
    """How a base is trained. `batch_tokens` counts prompt and answer tokens; rates are peaks."""

    batch_tokens: int = 2000
    matrix_lr: float = 0.01
    vector_lr: float = 0.02
    warmup_steps: int = 50
    floor: float = 0.02
    seed: int = 0
    stop_at: float = 0.995
    check_every: int = 150


@dataclass(frozen=True)
class Training:
    """What a training run did: steps, tokens, seconds on the wall and on the processors, last validation accuracy,
    torch threads."""

    steps: int
    tokens: int
    wall_s: float
    cpu_s: float
    validation_accuracy: float
    threads: int


def token_batches(examples: Sequence[Example], batch_tokens: int, rng: random.Random) -> list[list[int]]:
    """Indices of one pass in batches of at most `batch_tokens` padded tokens, like lengths together, order shuffled."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 4096):
        batch: list[int] = []
        for i in sorted(order[start : start + 4096], key=lambda i: len(examples[i])):
            if batch and (len(batch) + 1) * len(examples[i]) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def answer_batch(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T] int64 padded right, flat places [n] that predict answer tokens, and those tokens [n]."""
    length = max(len(e) for e in examples) - 1
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    places: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        tokens = (example.prompt + example.answer)[:-1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        first = row * length + len(example.prompt) - 1
        places += range(first, first + len(example.answer))
        targets += example.answer
    return ids, torch.tensor(places), torch.tensor(targets)


def on(model: Decoder, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors on the model's device."""
    return [tensor.to(model.embedding.device) for tensor in tensors]


def whole(examples: Sequence[Example]) -> list[Example]:
    """Examples whose every token but the first is to be predicted: for free text, where prompts teach too."""
    return [Example(e.prompt[:1], (*e.prompt[1:], *e.answer)) for e in examples]


@torch.no_grad()
def answer_loss(model: Decoder, examples: Sequence[Example]) -> float:
    """Mean loss of the answers' tokens, in nats."""
    total, n = 0.0, 0
    for batch in token_batches(examples, 6000, random.Random(0)):
        ids, places, targets = on(model, answer_batch([examples[i] for i in batch]))
        total += float(functional.cross_entropy(model(ids, places), targets, reduction="sum"))
        n += len(targets)
    return total / max(n, 1)


@torch.no_grad()
def right_answers(model: Decoder, examples: Sequence[Example]) -> list[bool]:
    """For each example, whether greedy decoding would give exactly its answer."""
    right = [False] * len(examples)
    for batch in token_batches(examples, 6000, random.Random(0)):
        ids, places, targets = on(model, answer_batch([examples[i] for i in batch]))
        hits = (model(ids, places).argmax(-1) == targets).split([len(examples[i].answer) for i in batch])
        for i, hit in zip(batch, hits, strict=True):
            right[i] = bool(hit.all())
    return right


def pretrain(
    model: Decoder,
    lessons: Sequence[Sequence[Example]],
    validation: Sequence[Example],
    recipe: Recipe,
    progress: Progress | None = None,
    watch: Callable[[int, float, float], None] | None = None,
) -> Training:
    """Train in place on each lesson's examples in turn; ends sooner when validation accuracy reaches `stop_at`.

    `watch(step, loss, accuracy)` is called at every validation check.
    """
    rng = random.Random(recipe.seed)
    batches = [(lesson, b) for lesson in lessons for b in token_batches(lesson, recipe.batch_tokens, rng)]
    muon = StackedMuon(model.matrices(), recipe.matrix_lr)
    adam = torch.optim.AdamW(model.others(), lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    wall, cpu, tokens, accuracy, recent = time.monotonic(), time.process_time(), 0, 0.0, 0.0
    steps = 0
    for steps, (lesson, batch) in enumerate(batches, start=1):
        ids, places, targets = on(model, answer_batch([lesson[i] for i in batch]))
        loss = functional.cross_entropy(model(ids, places), targets)
        loss.backward()
        done = steps / len(batches)
        rate = min(1.0, steps / recipe.warmup_steps) * (
            recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * done))
        )
        muon.lr = recipe.matrix_lr * rate
        adam.param_groups[0]["lr"] = recipe.vector_lr * rate
        muon.step()
        adam.step()
        adam.zero_grad(set_to_none=True)
        tokens += ids.numel()
        recent = 0.98 * recent + 0.02 * float(loss.detach()) if steps > 1 else float(loss.detach())
        if progress is not None:
            progress("base", steps, len(batches))
        if validation and (steps % recipe.check_every == 0 or steps == len(batches)):
            accuracy = sum(right_answers(model, validation)) / len(validation)
            if watch is not None:
                watch(steps, recent, accuracy)
            if accuracy >= recipe.stop_at:
                break
    seconds = time.monotonic() - wall, time.process_time() - cpu
    return Training(steps, tokens, *seconds, accuracy, torch.get_num_threads())
