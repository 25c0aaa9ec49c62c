"""Choosing the next token: greedy, or temperature and top-p with a generator of the request's own.

The log-probability that is reported is always that of the model's own distribution (temperature 1, no truncation): it
is what calibration saw, and a client's sampling settings must not move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p in (0, 1]; seed None draws fresh randomness."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class Sampler:
    """The sampling state of one request."""

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed & (2**63 - 1))

    def draw(self, logprobs: Tensor) -> int:
        """One token from logprobs [V] float32 (nats)."""
        if self.settings.temperature == 0.0:
            return int(logprobs.argmax())
        probabilities = (logprobs.double().cpu() / self.settings.temperature).softmax(dim=-1)
        if self.settings.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            # A token stays while the mass before it is below top_p: the smallest set that reaches it, never empty.
            ordered[ordered.cumsum(0) - ordered >= self.settings.top_p] = 0.0
            probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


@dataclass(frozen=True)
class Choice:
    """A chosen token and its log-probability in nats; `finite` is False if the model's numbers were not."""

    token: int
    logprob: float
    finite: bool


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """One token per row of logits [N, V] float32, each by its own sampler."""
    logprobs = torch.log_softmax(logits, dim=-1)
    finite = torch.isfinite(logprobs.sum(dim=-1)).tolist()
    greedy = logprobs.argmax(dim=-1).tolist()
    tokens = [
        token if sampler.settings.temperature == 0.0 or not ok else sampler.draw(logprobs[row])
        for row, (token, ok, sampler) in enumerate(zip(greedy, finite, samplers, strict=True))
    ]
    picked = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    return [Choice(*choice) for choice in zip(tokens, picked, finite, strict=True)]
