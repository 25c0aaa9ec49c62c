"""Backdoored classifiers, made once: trained from an encoder's weights and kept beside the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.purification.classifier_inputs import Arguments, cache_key
from offline_purify.encoder.classifier import Classifier
from offline_purify.encoder.finetune import train_classifier
from offline_purify.texts import Text
from offline_purify.train import TrainConfig

_BATCH = 16


def trained(
    given: Arguments,
    weights: str,
    texts: Sequence[Text],
    seed: int,
    cache: Path,
    progress: Callable[[str, int, int], None] | None,
    what: str,
) -> Path:
    """Folder of a classifier trained on ``texts`` from the encoder with digest ``weights``; taken if it is there."""
    folder = cache / cache_key(weights, given.epochs, given.lr, _BATCH, seed, [(t.text, t.label) for t in texts])
    if folder.is_dir():
        return folder
    classifier = Classifier.begin(given.weights, max(text.label for text in texts) + 1, seed, given.device)
    config = TrainConfig(epochs=given.epochs, lr=given.lr, batch_size=_BATCH, warmup=0.1, seed=seed)
    train_classifier(classifier, classifier.samples(texts), config, progress=progress, what=what)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    classifier.save(temporary)
    temporary.rename(folder)
    return folder
