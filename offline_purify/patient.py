"""What every model under repair is: weights that may change, a layout that says which head owns which of them.

A suspect (`offline_purify.suspect`) is a decoder; a classifier (`offline_purify.encoder.classifier`) is an encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from offline_purify.heads.layout import HeadLayout
from offline_purify.train import pad_id_of


class Patient(ABC):
    """A model in memory with its tokenizer and layout; ``parameters`` are what a repair changes."""

    def __init__(self, model: Any, tokenizer: Any, layout: HeadLayout) -> None:
        self.model, self.tokenizer, self.layout = model, tokenizer, layout
        self.pad_id = pad_id_of(tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What may change, by parameter name."""

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights that may change."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put weights taken with ``state`` back, bit for bit."""
        with torch.no_grad():
            for name, p in self.parameters().items():
                p.copy_(state[name])

    def attention_matrices(self) -> AbstractContextManager[None]:
        """Within: forwards can return attention matrices."""
        return eager_attention(self.model)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Within: forwards of a model, or of the base of an adapted one, can return attention matrices; as before after."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
