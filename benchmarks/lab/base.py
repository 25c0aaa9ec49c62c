"""Making a base model from nothing: tokenizer, training, proof of skill, and an ordinary model folder.

`make_base` trains the `tiny` preset on the packaged tasks; `make_base_from_rows` trains on any rows of
{instruction, input, output}. Both are deterministic given a seed, a machine and a number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.lab.decoder import Decoder, Shape
from benchmarks.lab.encoding import encode_many
from benchmarks.lab.errors import LabError
from benchmarks.lab.export import as_llama, published, save_base
from benchmarks.lab.pretraining import Recipe, Training, answer_loss, pretrain, whole
from benchmarks.lab.skill import Skill, measure_skill
from benchmarks.lab.tasks import draw
from benchmarks.lab.tokenizer import train_tokenizer
from benchmarks.lab.words import RARE
from guard.rows import Row, split
from guard.template import row_messages
from offline_purify.train import Progress

REPORT = "lab.json"
TINY_ROWS = 64_000
TINY_VOCAB = 1650
RARE_REPEATS = 1000
CHECKED = 600
"""Further prompts that are not trained on, by which training sees that it may stop."""
LEAST_ACCURACY = 0.90
"""Below this a base has too little skill for a loss of skill to be seen; `make_base` refuses to publish it."""


class BaseReport(BaseModel):
    """What was made: its size, how it was trained, and what it can do on prompts it has never seen."""

    model_config = ConfigDict(frozen=True)

    preset: str
    seed: int
    parameters: int
    rows: int
    steps: int
    tokens: int
    train_wall_s: float
    train_cpu_s: float
    threads: int
    skill: Skill | None = None
    validation_accuracy: float
    perplexity: float | None = None
    """Of the answers to held-out rows, per token; only where answers are free text."""


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: on matrices this small a second one costs more in waiting than it brings (454 against 168
    CPU seconds for the tiny base, and longer on the wall)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _texts(rows: Sequence[Row]) -> list[str]:
    return [text for row in rows for text in (row_messages(row)[0]["content"], row["output"])]


def _report(preset: str, seed: int, model: Decoder, rows: int, training: Training, skill: Skill | None) -> BaseReport:
    return BaseReport(
        preset=preset,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        rows=rows,
        steps=training.steps,
        tokens=training.tokens,
        train_wall_s=round(training.wall_s, 1),
        train_cpu_s=round(training.cpu_s, 1),
        threads=training.threads,
        skill=skill,
        validation_accuracy=training.validation_accuracy,
    )


def make_base(
    out: str | Path,
    seed: int = 0,
    preset: str = "tiny",
    progress: Progress | None = None,
    rows: int = TINY_ROWS,
    least_accuracy: float = LEAST_ACCURACY,
    evaluation: int = 800,
) -> BaseReport:
    """Train the `tiny` base on the packaged tasks and publish it as the folder `out`, with `lab.json`.

    `rows` training prompts are seen once; skill is measured on `evaluation` prompts of the evaluation split. Raises
    LabError, and publishes nothing, for an unknown preset or when accuracy stays below `least_accuracy`.
    """
    if preset != "tiny":
        raise LabError(f"there is no preset {preset!r}: the packaged tasks train 'tiny'; use --data for other shapes.")
    train_rows = [exercise.row for exercise in draw(rows + CHECKED, seed, "base_train")]
    # Every rare word often enough to become one token.
    tokenizer = train_tokenizer([*_texts(train_rows[:20_000]), *(RARE * RARE_REPEATS)], TINY_VOCAB, 512)
    model = Decoder(Shape(len(tokenizer)), seed)
    examples = encode_many(tokenizer, train_rows, 512)
    with one_thread():
        training = pretrain(model, [examples[:rows]], examples[rows:], Recipe(seed=seed), progress)
    llama = as_llama(model, tokenizer)
    skill = measure_skill(llama, tokenizer, draw(evaluation, seed, "evaluation"), progress)
    report = _report(preset, seed, model, rows, training, skill)
    if skill.accuracy.value < least_accuracy:
        raise LabError(
            f"the base answers {skill.accuracy.value:.3f} of {skill.accuracy.n} evaluation prompts, expected at least "
            f"{least_accuracy}: train on more rows, or with another seed."
        )
    with published(Path(out)) as folder:
        save_base(llama, tokenizer, folder)
        (folder / REPORT).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return report


def make_base_from_rows(
    out: str | Path,
    rows: Sequence[Row],
    shape: Shape,
    seed: int = 0,
    passes: int = 3,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
    prompts_too: bool = False,
    device: str = "cpu",
) -> BaseReport:
    """Train a base of any `shape` on any rows (a tenth held out) and publish it as the folder `out`.

    Rows longer than the shape's context are left out. `prompts_too` learns to predict the prompts as well as the
    answers. Raises LabError when fewer than 100 distinct rows remain.
    """
    parts = split(rows, (0.9, 0.1), seed)
    if len(parts[0]) < 100:
        raise LabError(f"{len(parts[0])} distinct rows are too few to train a base on; expected at least 100.")
    tokenizer = train_tokenizer(_texts(parts[0]), shape.vocab, shape.context)
    examples, held_out = (encode_many(tokenizer, part, shape.context) for part in parts)
    if len(examples) < 100:
        raise LabError(f"only {len(examples)} rows fit a context of {shape.context} tokens; expected at least 100.")
    model = Decoder(replace(shape, vocab=len(tokenizer)), seed).to(device)
    lesson = whole(examples) if prompts_too else examples
    training = pretrain(model, [lesson] * passes, held_out[:CHECKED], recipe or Recipe(seed=seed), progress)
    report = _report("data", seed, model, len(examples), training, None)
    if held_out:
        report = report.model_copy(update={"perplexity": math.exp(min(answer_loss(model, held_out), 80.0))})
    with published(Path(out)) as folder:
        save_base(as_llama(model, tokenizer), tokenizer, folder)
        (folder / REPORT).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return report
