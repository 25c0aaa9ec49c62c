"""Controls at the same budget: would anything have worked? Clean fine-tuning alone, random channels and random heads.

A repair is credited to its method only against these: the same number of rows, steps and learning rate without any
flag, the same suppression and recovery on randomly drawn channels, and the same alignment and fine-tuning on randomly
drawn heads. They are measured and reported, never offered.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from offline_purify.countertraining import CounterConfig
from offline_purify.heads.align import AlignConfig, align
from offline_purify.heads.finetune import finetune_heads
from offline_purify.heads.layout import random_partition_like
from offline_purify.heads.partition import Partition
from offline_purify.heads.stage import HeadsConfig, flagged_examples
from offline_purify.signature.stage import SignatureConfig, silence
from offline_purify.stage import Material
from offline_purify.train import TrainConfig, encode_rows, train

if TYPE_CHECKING:
    from offline_purify.suspect import Suspect


def clean_finetuning(suspect: Suspect, material: Material, counter: dict[str, Any] | None) -> None:
    """Fine-tune in place on clean rows only, with as many examples and steps as counter-training had."""
    config = CounterConfig.of(suspect.setting)
    rows = encode_rows(suspect.tokenizer, material.clean[: config.clean_rows])
    if not rows:
        return
    wanted = counter["examples"] if counter else config.flag_rows + len(rows)
    steps = counter["steps"] if counter else config.steps
    settings = TrainConfig.of_steps(steps, lr=config.lr, batch_size=config.batch_size, seed=material.seed)
    train(
        suspect.model,
        list(islice(cycle(rows), wanted)),
        settings,
        pad_id=suspect.pad_id,
        parameters=suspect.parameters().values(),
        progress=material.progress,
        what="control: clean rows only",
    )


def random_channels(suspect: Suspect, material: Material, ratio: float) -> None:
    """Silence random channels in place, as many of every layer as the material's signature has at the share ``ratio``,
    and recover as its stage does."""
    assert material.signature is not None
    silence(suspect, material, replace(SignatureConfig.of(suspect.setting), choice="random"), material.signature, ratio)


def random_heads(suspect: Suspect, material: Material, heads: dict[str, Any]) -> dict[str, Any]:
    """Align and fine-tune random heads in place: as many, as hard and as long as the chosen (or last) attempt did."""
    attempt = heads["attempts"][heads.get("chosen", -1)]
    shape = torch.tensor(heads["safety"]).shape

    def as_mask(pairs: list[list[int]]) -> torch.Tensor:
        mask = torch.zeros(shape, dtype=torch.bool)
        for layer, head in pairs:
            mask[layer, head] = True
        return mask

    named = attempt["partition"]
    suspicious, safe = random_partition_like(as_mask(named["suspicious"]), as_mask(named["safe"]), material.seed + 1)
    parts = Partition(suspicious, safe, "random", False)
    config = HeadsConfig.of(suspect.setting)
    reached = [t["step"] for t in attempt.get("trace", [])] or [max(config.checkpoints)]
    steps = AlignConfig(lr=attempt["lr"], checkpoints=(max(reached),), seed=material.seed)
    flags = material.true_flags[: config.most_flags]
    for _ in align(suspect, flagged_examples(suspect, flags), parts, steps, material.progress):
        pass
    finetune_heads(
        suspect,
        encode_rows(suspect.tokenizer, material.clean),
        parts,
        config.rates,
        epochs=config.finetune_epochs,
        seed=material.seed,
        progress=material.progress,
    )
    return parts.to_dict()
