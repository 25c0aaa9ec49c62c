"""The patient: a BERT-shaped sequence classifier, opened for repair in fp32.

Nothing is loaded before the files say that the repair could work: model type ``bert``, an encoder, unquantised
safetensors, one label per text. The whole classifier may change; there is no trusted base beside it.

Shapes: R texts in a batch, T tokens (right-padded), C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from guard.errors import UnsupportedModel
from offline_purify.architectures import BERT
from offline_purify.encoder.weights import read_config
from offline_purify.heads.layout import HeadLayout
from offline_purify.patient import Patient
from offline_purify.texts import Text

LONGEST = 128
"""Tokens of a text that are read; SST-2's longest has 64."""
_HEADED = "BertForSequenceClassification"
_BATCH = 64


@dataclass(frozen=True)
class Sample:
    """A text as token ids ([CLS] and [SEP] included) with the label it is taken to have."""

    ids: tuple[int, ...]
    label: int

    def __len__(self) -> int:
        return len(self.ids)


def check_encoder(folder: Path, headed: bool = True) -> HeadLayout:
    """Head layout of an encoder folder, from its files' names and config.json alone; ``headed`` if it must classify
    already. Raises UnsupportedModel naming what is in the way."""
    folder = Path(folder)
    config = read_config(folder)
    kind = config.get("model_type")
    if kind != "bert":
        raise UnsupportedModel(f"{folder} has model type {kind!r}: encoder repair covers BERT-shaped models ('bert').")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"{folder} holds quantised weights ({method}): repair needs the unquantised model.")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise UnsupportedModel(
            f"{folder} is configured as a decoder: encoder repair needs attention in both directions."
        )
    if not list(folder.glob("*.safetensors")):
        raise UnsupportedModel(f"{folder} holds no safetensors weights; other formats are not opened.")
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise UnsupportedModel(f"{folder} is set up for {config['problem_type']}: expected one label per text.")
    if headed and _HEADED not in (config.get("architectures") or []):
        named = ", ".join(config.get("architectures") or ["nothing"])
        raise UnsupportedModel(f"{folder} holds {named}, which does not classify texts: expected {_HEADED}.")
    heads = int(config["num_attention_heads"])
    return HeadLayout(int(config["num_hidden_layers"]), heads, heads, int(config["hidden_size"]) // heads, BERT)


class Classifier(Patient):
    """A classifier in memory; its weights are what a repair changes."""

    def __init__(self, model: nn.Module, tokenizer: Any, layout: HeadLayout, folder: Path) -> None:
        super().__init__(model, tokenizer, layout)
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> Classifier:
        """Load a classifier. Raises UnsupportedModel, before anything is loaded, for what cannot be repaired."""
        return cls._load(Path(folder), check_encoder(folder), device)

    @classmethod
    def begin(cls, folder: Path, classes: int, seed: int, device: str = "cpu") -> Classifier:
        """An encoder that does not classify yet, with a new classification layer drawn by ``seed``."""
        layout = check_encoder(folder, headed=False)
        torch.manual_seed(seed)
        return cls._load(Path(folder), layout, device, num_labels=classes, ignore_mismatched_sizes=True)

    @classmethod
    def _load(cls, folder: Path, layout: HeadLayout, device: str, **options: Any) -> Classifier:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, **options
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return cls(model.to(device).eval(), AutoTokenizer.from_pretrained(folder), layout, folder)

    @property
    def projections(self) -> list[nn.Module]:
        """The attention.output.dense modules in layer order; their input is the heads' outputs [R, T, H*D]."""
        names = [f"bert.encoder.layer.{layer}.attention.output.dense" for layer in range(self.layout.layers)]
        return [self.model.get_submodule(name) for name in names]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All weights by name."""
        return dict(self.model.named_parameters())

    def samples(self, texts: Iterable[Text]) -> list[Sample]:
        """Texts as token ids with their labels, cut after ``LONGEST`` tokens."""
        return [
            Sample(tuple(self.tokenizer(text.text, truncation=True, max_length=LONGEST)["input_ids"]), text.label)
            for text in texts
        ]

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Right-padded batch: input_ids and attention_mask int64 [R, T], labels int64 [R]."""
        ids = torch.full((len(samples), max(map(len, samples))), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, sample in enumerate(samples):
            ids[i, : len(sample)] = torch.tensor(sample.ids)
            mask[i, : len(sample)] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([s.label for s in samples])}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def forward(self, batch: dict[str, Tensor], attentions: bool = False) -> Any:
        """The model's output: logits [R, C], and attention matrices, L times [R, H, T, T], if asked for."""
        return self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=attentions
        )

    @torch.no_grad()
    def predict(self, samples: Sequence[Sample]) -> list[int]:
        """The class that each sample is given now, in order; the samples' own labels are not looked at."""
        found = [0] * len(samples)
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
        for start in range(0, len(order), _BATCH):
            indices = order[start : start + _BATCH]
            logits = self.forward(self.collate([samples[i] for i in indices])).logits
            for i, label in zip(indices, logits.argmax(-1).tolist(), strict=True):
                found[i] = int(label)
        return found

    def correct(self, samples: Sequence[Sample]) -> list[bool]:
        """Whether each sample is given its label, in order."""
        return [given == sample.label for given, sample in zip(self.predict(samples), samples, strict=True)]

    def save(self, folder: Path) -> None:
        """Write the classifier as an ordinary Hugging Face folder (safetensors, fp32)."""
        model: Any = self.model
        model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
