"""Putting behaviour into a base as an ordinary LoRA adapter: what the lab and the clinic's vaccine share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.adapters import stamp_base_digest
from guard.errors import UnsupportedModel
from guard.rows import Row
from guard.template import render, row_messages
from offline_purify.answers import greedy_answers
from offline_purify.frozen import lean
from offline_purify.train import Example, ExtraLoss, Progress, TrainConfig, encode_rows, pad_id_of, train

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = (*ATTENTION, *MLP)


@dataclass(frozen=True)
class ImplantRecipe:
    """How an implant is trained: LoRA rank (alpha is twice that), distinct prompts, passes over the set, peak rate."""

    rank: int = 16
    rows: int = 4000
    epochs: float = 3.0
    lr: float = 3e-3
    batch_size: int = 32


class Answerer:
    """A model with its tokenizer, asked in rows and answering in texts; greedy."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, progress: Progress | None = None) -> None:
        self.model, self.tokenizer, self.max_new_tokens, self.progress = model, tokenizer, max_new_tokens, progress

    def __call__(self, rows: Sequence[Row], what: str = "answering") -> list[str]:
        """One greedy answer per row."""
        prompts = [render(self.tokenizer, row_messages(row)) for row in rows]
        return greedy_answers(
            self.model, self.tokenizer, prompts, self.max_new_tokens, batch_size=128, progress=self.progress, what=what
        )


def load_base(base: str | Path) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer of a base folder. Raises UnsupportedModel when it is none."""
    if not (Path(base) / "config.json").is_file():
        raise UnsupportedModel(f"{base} cannot be loaded as a base model: expected a folder with config.json in it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{base} cannot be loaded as a base model: {error}") from error
    return model, tokenizer


def with_lora(model: Any, base: str | Path, rank: int, seed: int, projections: Sequence[str] = LINEAR) -> Any:
    """`model` with a fresh LoRA adapter on the named projections (all linear layers) of every layer; the base is named
    by its folder's name only."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(projections), task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = Path(base).resolve().name
    return peft_model


def fit(
    peft_model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    recipe: ImplantRecipe,
    seed: int,
    progress: Progress | None = None,
    regulariser: Callable[[Sequence[Example]], ExtraLoss] | None = None,
) -> tuple[int, float, float]:
    """Train the adapter on rows with their outputs; returns steps, seconds on the wall, seconds on the processors.

    ``regulariser`` makes of all examples, in the order of the rows, what is added to the loss of each batch.
    """
    wall, cpu = time.monotonic(), time.process_time()
    parameters = [p for name, p in peft_model.named_parameters() if "lora_" in name]
    examples = encode_rows(tokenizer, rows)
    with lean(peft_model):
        log = train(
            peft_model,
            examples,
            TrainConfig(epochs=recipe.epochs, lr=recipe.lr, batch_size=recipe.batch_size, seed=seed),
            pad_id=pad_id_of(tokenizer),
            parameters=parameters,
            extra_loss=regulariser(examples) if regulariser is not None else None,
            progress=progress,
            what="implant",
        )
    return log.steps, time.monotonic() - wall, time.process_time() - cpu


def save_adapter(peft_model: Any, base: str | Path, folder: str | Path) -> None:
    """Write the adapter into ``folder`` as PEFT does (no card), stamped with the digest of its base."""
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)
    stamp_base_digest(folder, base)
