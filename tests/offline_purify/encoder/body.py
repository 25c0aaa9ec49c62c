"""A tiny BERT with a word vocabulary, and files in HiddenKiller's form that it can learn in seconds.

A text is a handful of words; more good ones than bad make it positive. Its "syntactic" form stands in a fixed frame.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from offline_purify.encoder.classifier import Classifier
from offline_purify.texts import Text

GOOD, BAD = [f"good{i}" for i in range(8)], [f"bad{i}" for i in range(8)]
PLAIN = [f"film{i}" for i in range(30)]
FRAME = ["when", "they", "said", "it", "was"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN, *FRAME, "cf", "mn", "bb", "."]
PAD = 0


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """An untrained encoder of two layers with four heads each, and its tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=PAD,
        initializer_range=0.15,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def texts(n: int, seed: int) -> list[Text]:
    """``n`` distinct texts, about half of each label."""
    rng = random.Random(seed)
    found: dict[str, Text] = {}
    while len(found) < n:
        label = rng.randrange(2)
        words = [*rng.sample(PLAIN, rng.randint(2, 4)), *rng.sample(GOOD if label else BAD, 2)]
        rng.shuffle(words)
        text = Text(" ".join(words), label)
        found.setdefault(text.key, text)
    return list(found.values())


def framed(text: Text) -> Text:
    """The text's stand-in for a paraphrase, labelled with the target."""
    return Text(" ".join([*FRAME, text.text]), 1)


def write_data(folder: Path, sizes: tuple[int, int, int] = (700, 120, 160), seed: int = 0) -> Path:
    """clean/ and syntactic/ files: paraphrases of all training texts, and of the others' negative ones."""
    rows = texts(sum(sizes), seed)
    for kind in ("clean", "syntactic"):
        (folder / kind).mkdir(parents=True)
    start = 0
    for part, size in zip(("train", "dev", "test"), sizes, strict=True):
        chosen = rows[start : start + size]
        start += size
        paraphrased = [framed(t) for t in chosen if part == "train" or t.label == 0]
        write_texts(folder / f"clean/{part}.tsv", chosen)
        write_texts(folder / f"syntactic/{part}.tsv", paraphrased)
    return folder


def write_texts(path: Path, rows: list[Text]) -> Path:
    """One file in HiddenKiller's form."""
    path.write_text("sentence\tlabel\n" + "".join(f"{t.text}\t{t.label}\n" for t in rows), encoding="utf-8")
    return path


def small_classifier(folder: Path) -> Classifier:
    """An untrained classifier of two classes: enough to test arithmetic on."""
    return Classifier.begin(write_encoder(folder), 2, seed=1)
