"""What a probe hands to the arithmetic above it: Grams, sinks, focus and log-probabilities, at checkpoints.

A `Reading` is one request at one checkpoint (the serving engine makes them while it generates); `Readings` are many
requests at one checkpoint and a `Measurement` is many requests at all of them (calibration and repair make those).
Step 0 holds the row of the last prompt position, the one that predicts the first token, and apart from it those of the
few positions before (`earlier`); step t also holds the rows of the first t generated tokens. The log-probabilities are
those of the tokens sampled so far, t + 1 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from guard.features import beside_length, head_features
from guard.gram import Earlier, HeadSums
from guard.similarity import pair_cosines

CHECKPOINTS = (0, 1, 2, 4, 8, 16, 32)


def checkpoints_within(new_tokens: int | None) -> tuple[int, ...]:
    """Checkpoints that answers of so many tokens can reach: 0, then the powers of two below `new_tokens`; for no number
    the usual ones."""
    if new_tokens is None:
        return CHECKPOINTS
    return (0, *(step for step in (2**power for power in range(30)) if step < new_tokens))


@dataclass(frozen=True)
class Reading:
    """One request at one checkpoint: gram [L, H, H], sink [L, H], norms [L, 2 (H + H_kv)] and focus [T_p] fp32, summed
    over step + 1 rows; logprobs of step + 1 tokens (nats); at step 0 also the rows of earlier prompt positions, where
    they were read."""

    step: int
    gram: torch.Tensor
    sink: torch.Tensor
    norms: torch.Tensor
    focus: torch.Tensor
    logprobs: tuple[float, ...]
    earlier: Earlier | None = None

    @classmethod
    def of(cls, step: int, sums: HeadSums, logprobs: Sequence[float]) -> Reading:
        """From what a bank holds of the request at this step."""
        told = sums.cpu()
        return cls(step, told.gram, told.sink, told.norms, told.focus, tuple(logprobs), told.earlier)


@dataclass(frozen=True)
class Readings:
    """n requests at checkpoint ``step``: index [n] into the measurement, gram [n, L, H, H], sink [n, L, H] and norms
    [n, L, 2 (H + H_kv)] fp32, logprobs [n, step + 1], focus: n vectors [T_p] fp32; first: the same requests at step 0
    (beyond it, where known); earlier: rows of earlier prompt positions [n, ...] (at step 0, where they were read)."""

    step: int
    index: np.ndarray
    gram: torch.Tensor
    sink: torch.Tensor
    norms: torch.Tensor
    logprobs: np.ndarray
    focus: list[np.ndarray]
    first: Readings | None = None
    earlier: Earlier | None = None

    @classmethod
    def together(
        cls, step: int, shape: tuple[int, int, int], read: Sequence[tuple[int, HeadSums, Sequence[float]]]
    ) -> Readings:
        """From what a bank held of requests at one step: (index, sums, log-probabilities) of each; `shape` are L, H and
        H_kv."""
        layers, heads, kv_heads = shape
        sums = [told.cpu() for _, told, _ in read]
        earlier = [told.earlier for told in sums if told.earlier is not None]
        return cls(
            step,
            np.asarray([index for index, *_ in read], dtype=np.int64),
            torch.stack([told.gram for told in sums]) if sums else torch.zeros(0, layers, heads, heads),
            torch.stack([told.sink for told in sums]) if sums else torch.zeros(0, layers, heads),
            torch.stack([told.norms for told in sums]) if sums else torch.zeros(0, layers, 2 * (heads + kv_heads)),
            np.asarray([logprobs for *_, logprobs in read], dtype=np.float64).reshape(len(read), step + 1),
            [told.focus.numpy() for told in sums],
            earlier=Earlier(*map(torch.stack, zip(*earlier, strict=True))) if earlier else None,
        )

    @property
    def opening(self) -> Readings:
        """These requests at the last prompt position, before any token: all that their own text cannot have changed.

        Raises ValueError beyond step 0 when it is not known (`Measurement.reached` knows it)."""
        if self.step == 0:
            return self
        if self.first is None:
            raise ValueError(f"readings at step {self.step} without those of the same requests at step 0")
        return self.first

    @cached_property
    def cosines(self) -> np.ndarray:
        """Cosines of the head pairs of each layer, float64 [n, L * H * (H - 1) / 2]: computed once for all signals."""
        return pair_cosines(self.gram)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Prompt tokens of each request, int [n]."""
        return np.asarray([len(vector) for vector in self.focus], dtype=np.int64)

    @cached_property
    def last_row(self) -> np.ndarray:
        """Features of the row of the last prompt position alone, and the prompt's length: float64 [n, F + 1] (at
        step 0)."""
        return beside_length(self._last_row, self.tokens)

    @cached_property
    def features(self) -> np.ndarray:
        """Everything the multivariate signals see, float64: see `guard.features`.

        [n, R F + 1] of the rows of the last R prompt positions, each apart, and the prompt's length; beyond step 0
        those and, beside them, the same of the generated rows alone, [n, (R + 1) F + 1]. Apart, because a sum of both
        lets the text drown what the prompt did. ValueError as ``opening``."""
        before = self.opening
        if self.step == 0:
            return beside_length(self._prompt_rows, self.tokens)
        gram, sink, norms = self.gram - before.gram, self.sink - before.sink, self.norms - before.norms
        generated = head_features(pair_cosines(gram), gram, sink, norms, self.step)
        return beside_length(np.concatenate((before._prompt_rows, generated), axis=1), before.tokens)

    @cached_property
    def _last_row(self) -> np.ndarray:
        return head_features(self.cosines, self.gram, self.sink, self.norms, 1)

    @cached_property
    def _prompt_rows(self) -> np.ndarray:
        if self.earlier is None:
            return self._last_row
        gram, sink, norms = self.earlier
        return np.concatenate((self._last_row, head_features(pair_cosines(gram), gram, sink, norms, 1)), axis=1)

    @classmethod
    def single(cls, reading: Reading, first: Readings | None = None) -> Readings:
        """One request's reading as a batch of one, beside the batch that its reading at step 0 is."""
        return cls(
            reading.step,
            np.zeros(1, dtype=np.int64),
            reading.gram[None],
            reading.sink[None],
            reading.norms[None],
            np.asarray([reading.logprobs], dtype=np.float64),
            [reading.focus.numpy()],
            first,
            None if reading.earlier is None else Earlier(*(part[None] for part in reading.earlier)),
        )

    def reading(self, row: int) -> Reading:
        """The request at position ``row`` of this batch, alone."""
        return Reading(
            self.step,
            self.gram[row],
            self.sink[row],
            self.norms[row],
            torch.from_numpy(self.focus[row]),
            tuple(self.logprobs[row].tolist()),
            None if self.earlier is None else Earlier(*(part[row] for part in self.earlier)),
        )

    def take(self, rows: np.ndarray) -> Readings:
        """The requests at positions ``rows`` (int [m]) of this batch."""
        chosen = torch.from_numpy(rows)
        return Readings(
            self.step,
            self.index[rows],
            self.gram[chosen],
            self.sink[chosen],
            self.norms[chosen],
            self.logprobs[rows],
            [self.focus[i] for i in rows],
            None if self.first is None else self.first.take(rows),
            None if self.earlier is None else Earlier(*(part[chosen] for part in self.earlier)),
        )


@dataclass(frozen=True)
class Measurement:
    """n requests: prompt_len [n] tokens, the generated token ids of each, and the readings by checkpoint (a request is
    in the readings of a checkpoint only if it got that far)."""

    prompt_len: np.ndarray
    answers: list[list[int]]
    at: dict[int, Readings]

    def __len__(self) -> int:
        return len(self.prompt_len)

    def reached(self, step: int) -> Readings:
        """The readings at ``step``, with the same requests' at step 0 beside them; a request that was not read at step
        0 is left out. Raises KeyError when ``step`` or step 0 was not measured."""
        readings, begun = self.at[step], self.at[0]
        if step == 0:
            return begun
        if step not in self._reached:
            kept = readings.take(np.flatnonzero(np.isin(readings.index, begun.index)))
            first = begun.take(np.searchsorted(begun.index, kept.index))
            self._reached[step] = replace(kept, first=first)
        return self._reached[step]

    @cached_property
    def _reached(self) -> dict[int, Readings]:
        return {}  # made once: what is computed from readings is kept with them

    def take(self, rows: np.ndarray) -> Measurement:
        """The requests ``rows`` (int [m], ascending) alone, numbered anew."""
        at = {}
        for step, readings in self.at.items():
            kept = readings.take(np.flatnonzero(np.isin(readings.index, rows)))
            at[step] = replace(kept, index=np.searchsorted(rows, kept.index))
        return Measurement(self.prompt_len[rows], [self.answers[i] for i in rows], at)
