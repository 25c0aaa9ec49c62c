"""Supervised fine-tuning: the one training loop of the clinic and of the lab.

Loss is the cross-entropy of the answer's tokens (EOS included) given the rendered prompt; prompt tokens carry no loss.
Everything is fp32, seeded, and says what it does: which parameters move is passed in, batches gather examples of
similar length, AdamW follows a linear warm-up and a cosine to zero. It is not a framework: no mixed precision, no
checkpoints, no distribution.

Shapes: R rows in a batch, T tokens (right-padded), V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from guard.rows import Row
from guard.template import answer_ids, render, row_messages

IGNORED = -100
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called after every unit of work; None where nobody watches."""
ExtraLoss = Callable[[Sequence[int]], Tensor]
"""``extra_loss(indices)``: a scalar added to a batch's loss, from the indices of the batch's examples."""


@dataclass(frozen=True)
class Example:
    """One prompt and its answer as token ids; ``answer`` ends with EOS. Only ``answer`` is learnt."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ``lr`` is the peak; ``batch_size`` in examples; ``warmup`` a share of all steps."""

    epochs: float = 3.0
    lr: float = 1e-3
    batch_size: int = 16
    warmup: float = 0.06
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    max_steps: int | None = None

    @classmethod
    def of_steps(cls, steps: int, **others: Any) -> TrainConfig:
        """As many passes, whole or not, as make ``steps``."""
        return cls(epochs=steps, max_steps=steps, **others)


@dataclass
class TrainLog:
    """What happened: mean answer loss of each step, in nats per token."""

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0

    def last(self, n: int = 10) -> float:
        """Mean loss of the last ``n`` steps (nan if there were none)."""
        tail = self.losses[-n:]
        return sum(tail) / len(tail) if tail else math.nan


def encode_row(tokenizer: Any, row: Row) -> Example:
    """The example of one row: rendered prompt and the row's output."""
    return Example(
        tuple(render(tokenizer, row_messages(row), add_generation_prompt=True)),
        tuple(answer_ids(tokenizer, row["output"])),
    )


def encode_rows(tokenizer: Any, rows: Iterable[Row]) -> list[Example]:
    """Examples of rows, in order."""
    return [encode_row(tokenizer, row) for row in rows]


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Right-padded batch: input_ids, attention_mask, labels, each int64 [R, T]; labels are -100 off the answers."""
    length = max(map(len, examples))

    def padded(rows: Iterable[tuple[int, ...]], filler: int) -> Tensor:
        return torch.tensor([row + (filler,) * (length - len(row)) for row in rows], device=device)

    return {
        "input_ids": padded((e.prompt + e.answer for e in examples), pad_id),
        "attention_mask": padded(((1,) * len(e) for e in examples), 0),
        "labels": padded(((IGNORED,) * len(e.prompt) + e.answer for e in examples), IGNORED),
    }


def pad_id_of(tokenizer: Any) -> int:
    """The tokenizer's padding id, or its EOS where it has none (padding is masked everywhere)."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id)


def length_batches(examples: Sequence[Sized], batch_size: int, rng: random.Random) -> list[list[int]]:
    """Indices of one epoch: shuffled, cut in pools of 16 batches, each pool sorted by length, batches shuffled
    again."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    pool = batch_size * 16
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda i: len(examples[i]))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches


def index_batches(examples: Sequence[Sized], config: TrainConfig) -> Iterator[list[int]]:
    """Indices of the batches of a whole training: all epochs, cut off at its last step."""
    per_epoch = math.ceil(len(examples) / config.batch_size)
    left = max(1, round(per_epoch * config.epochs))
    if config.max_steps is not None:
        left = min(left, config.max_steps)
    rng = random.Random(config.seed)
    while left > 0:
        batches = length_batches(examples, config.batch_size, rng)[:left]
        yield from batches
        left -= len(batches)


def answer_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed answer loss per row in nats [R] fp32 and number of answer tokens per row [R] int64.

    logits [R, T, V], labels [R, T] with -100 where there is no loss (shifted here).
    """
    shifted = labels[:, 1:]
    rows, positions = (shifted != IGNORED).nonzero(as_tuple=True)
    picked = logits[rows, positions].float()
    per_token = nn.functional.cross_entropy(picked, shifted[rows, positions], reduction="none")
    sums = per_token.new_zeros(labels.shape[0]).index_add(0, rows, per_token)
    return sums, (shifted != IGNORED).sum(1)


def answer_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] where an answer token is predicted, that token [N] and its row [N], for the N answer tokens of a
    batch of a causal model. The output layer, the widest of all, is applied there alone: prompts are longer than
    answers. Nothing is masked: padding stands on the right, where no token looks."""
    labels = batch["labels"][:, 1:]
    rows, positions = (labels != IGNORED).nonzero(as_tuple=True)
    picked = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][rows, positions],))
    try:
        out = model(input_ids=batch["input_ids"], use_cache=False)
    finally:
        picked.remove()
    return out.logits, labels[rows, positions], rows


def answer_sums(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`answer_losses` of a batch: summed per row in nats [R] fp32, and the number of answer tokens [R] int64."""
    logits, tokens, rows = answer_logits(model, batch)
    per_token = nn.functional.cross_entropy(logits.float(), tokens, reduction="none")
    count = len(batch["labels"])
    return per_token.new_zeros(count).index_add(0, rows, per_token), rows.bincount(minlength=count)


def batch_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Mean answer loss of a batch (nats per answer token) and how many answer tokens it has."""
    sums, counts = answer_sums(model, batch)
    n = int(counts.sum())
    return sums.sum() / max(n, 1), n


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up over ``config.warmup`` of the steps, then a cosine to zero."""
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    pad_id: int,
    parameters: Iterable[nn.Parameter] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    extra_loss: ExtraLoss | None = None,
    progress: Progress | None = None,
    what: str = "training",
) -> TrainLog:
    """Fine-tune ``model`` in place on ``examples``; only ``parameters`` move (default: all that require grad).

    ``before_step`` / ``after_step`` run around every optimiser step (head-wise fine-tuning scales updates there).
    ``extra_loss`` is added to the answers' loss of every batch, and is in the log's losses too.
    Flags of ``requires_grad`` and the training mode are put back as they were. Dropout is off: a repair should not
    depend on it, and the lab is deterministic without. Raises ValueError when there is nothing to train on.
    """
    if not examples:
        raise ValueError("no training examples: at least one row with an answer is needed")
    chosen = list(parameters) if parameters is not None else [p for p in model.parameters() if p.requires_grad]

    def loss_of(indices: list[int]) -> tuple[Tensor, int]:
        loss, tokens = batch_loss(model, collate([examples[i] for i in indices], pad_id, chosen[0].device))
        return (loss if extra_loss is None else loss + extra_loss(indices)), tokens

    return descend(
        model,
        list(index_batches(examples, config)),
        loss_of,
        config,
        parameters=chosen,
        before_step=before_step,
        after_step=after_step,
        progress=progress,
        what=what,
    )


def descend(
    model: nn.Module,
    steps: Sequence[list[int]],
    loss_of: Callable[[list[int]], tuple[Tensor, int]],
    config: TrainConfig,
    *,
    parameters: Iterable[nn.Parameter],
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    progress: Progress | None = None,
    what: str = "training",
) -> TrainLog:
    """The steps of ``train`` for any loss: ``loss_of(indices)`` is a batch's mean loss and what it counts (tokens or
    rows), ``steps`` the indices of every batch. Raises ValueError when no parameter was chosen."""
    chosen = list(parameters)
    if not chosen:
        raise ValueError("no trainable parameters were selected")
    before = {id(p): p.requires_grad for p in model.parameters()}
    keep = {id(p) for p in chosen}
    for p in model.parameters():
        p.requires_grad_(id(p) in keep)
    was_training = model.training
    model.eval()
    total = len(steps)
    optimizer = torch.optim.AdamW(chosen, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    log = TrainLog()
    try:
        for indices in steps:
            loss, tokens = loss_of(indices)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip > 0:
                nn.utils.clip_grad_norm_(chosen, config.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(log.steps, total, config)
            if before_step is not None:
                before_step()
            optimizer.step()
            if after_step is not None:
                after_step()
            log.losses.append(float(loss.detach()))
            log.steps += 1
            log.tokens += tokens
            if progress is not None:
                progress(what, log.steps, total)
    finally:
        optimizer.zero_grad(set_to_none=True)
        for p in model.parameters():
            p.requires_grad_(before[id(p)])
        model.train(was_training)
    return log


@torch.no_grad()
def mean_answer_losses(
    model: nn.Module, examples: Sequence[Example], *, pad_id: int, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Per example: summed answer loss in nats [n] fp32 and number of answer tokens [n] int64 (order kept)."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums, counts = torch.zeros(len(examples)), torch.zeros(len(examples), dtype=torch.long)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([examples[i] for i in indices], pad_id, device)
        s, c = answer_sums(model, batch)
        sums[indices], counts[indices] = s.cpu(), c.cpu()
    model.train(was_training)
    return sums, counts


def perplexity(sums: Tensor, counts: Tensor) -> float:
    """exp of the mean answer loss per token; sums [n] in nats, counts [n]."""
    return math.exp(min(float(sums.sum() / counts.sum().clamp(min=1)), 80.0))
