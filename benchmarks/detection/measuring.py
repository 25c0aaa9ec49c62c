"""One runner for a whole run: calibrate a revision, read prompts, and turn readings into p-values of every test.

A test is a set of signals under the same conformal machinery: ``fused`` (what a server runs), ``fused_attention_only``
(the same without confidence), and each signal alone. The promise holds for each; what differs is what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guard.detector import Detector
from guard.probes.transformers.calibrate import calibrate
from guard.probes.transformers.forced import measure_forced
from guard.probes.transformers.measure import Progress as Counter
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.profile import Profile
from guard.readings import CHECKPOINTS, Measurement
from guard.rows import Row
from guard.signals import SIGNALS
from guard.template import render, row_messages
from guard.vaccine import Vaccine
from guard.verdict import Window

Progress = Callable[[str, int, int], None]
FUSED, ATTENTION = "fused", "fused_attention_only"


@dataclass(frozen=True)
class Read:
    """Measured requests, the rows they came from, and how many rows did not fit the context (they are not in here)."""

    rows: list[Row]
    measurement: Measurement
    n_too_long: int


class Watched:
    """One revision with its profile and a detector for every test."""

    def __init__(self, bench: Bench, profile: Profile, revision: str | None) -> None:
        self.bench, self.profile, self.revision = bench, profile, revision
        self.detectors = {
            name: Detector(profile, bench.window, bench.alpha, signals) for name, signals in tests(profile).items()
        }

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints that the window holds."""
        return self.detectors[FUSED].checkpoints

    def read(self, rows: Sequence[Row], what: str, max_new_tokens: int | None = None) -> Read:
        """Measure rows at the window's checkpoints."""
        kept = self.bench.fitting(rows)
        prompts = [self.bench.prompt(row) for row in kept]
        counter = self.bench.counter(what)
        found = measure(self.bench.runner, prompts, self.steps, max_new_tokens, self.revision, counter)
        return Read(kept, found, len(rows) - len(kept))

    def read_long(self, rows: Sequence[Row], what: str) -> Read:
        """Measure rows at every checkpoint there is, with whole answers as far as the last one."""
        kept = self.bench.fitting(rows)
        prompts = [self.bench.prompt(row) for row in kept]
        found = measure(self.bench.runner, prompts, CHECKPOINTS, None, self.revision, self.bench.counter(what))
        return Read(kept, found, len(rows) - len(kept))

    def read_forced(
        self, rows: Sequence[Row], answers: Sequence[Sequence[int]], what: str, as_sampled: bool = False
    ) -> Read:
        """Measure rows with ``answers`` (token ids, one each) put in the model's mouth; see `measure_forced`."""
        kept = [(row, answer) for row, answer in zip(rows, answers, strict=True) if self.bench.fits(row)]
        prompts = [self.bench.prompt(row) for row, _ in kept]
        counter = self.bench.counter(what)
        forced = [answer for _, answer in kept]
        found = measure_forced(self.bench.runner, prompts, forced, self.steps, self.revision, counter, as_sampled)
        return Read([row for row, _ in kept], found, len(rows) - len(kept))

    def p_values(self, read: Read, test: str = FUSED) -> np.ndarray:
        """p-values of a test, float64 [n + too long]; NaN for what was not scored, too long prompts at the end."""
        p = self.detectors[test].p_values(read.measurement)
        return np.concatenate((p, np.full(read.n_too_long, np.nan)))

    def p_values_of(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """p-values [n] of the fused test, of prompts of token ids."""
        return self.detectors[FUSED].p_values(measure(self.bench.runner, prompts, self.steps, None, self.revision))

    def grid(self, test: str = FUSED) -> np.ndarray:
        """All p-values that the held-out requests can give, one per request and bucket."""
        buckets = self.profile.buckets(self.bench.window, self.detectors[test].signals)
        return np.concatenate([bucket_grid(len(bucket.maxima)) for bucket in buckets])


class Bench:
    """A base that is loaded once, with what all measurements of a run share."""

    def __init__(
        self,
        base: Path,
        vaccine: Vaccine | None,
        alpha: float,
        window: Window,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.base, self.vaccine, self.alpha, self.seed = base, vaccine, alpha, seed
        self.window: Window = window
        self.progress = progress
        self.runner = Runner.load(base, device=device, max_slots=64)

    def prompt(self, row: Row) -> list[int]:
        """Token ids of a row's prompt, as a server would template it."""
        return render(self.runner.tokenizer, row_messages(row))

    def fits(self, row: Row) -> bool:
        """Whether the prompt leaves room for a token."""
        return len(self.prompt(row)) < self.runner.max_len

    def fitting(self, rows: Sequence[Row]) -> list[Row]:
        """Rows whose prompts fit the context."""
        return [row for row in rows if self.fits(row)]

    def counter(self, what: str) -> Counter | None:
        """A (done, total) progress function for one named stretch of work."""
        sink = self.progress
        if sink is None:
            return None
        return lambda done, total: sink(what, done, total)

    @contextmanager
    def watching(
        self, adapter: Path | None, rows: Sequence[Row], what: str, keep_repeated: bool = False
    ) -> Iterator[Watched]:
        """Calibrate an adapter (None: the base) on rows and keep it loaded while the block runs.

        ``keep_repeated``: the operator vouches for answers that repeat (see `guard.hygiene`).
        """
        profile = calibrate(
            self.base,
            adapter,
            self.fitting(rows),
            vaccine=self.vaccine,
            keep_repeated=keep_repeated,
            seed=self.seed,
            runner=self.runner,
            progress=self.counter(f"calibrating {what}"),
        )
        revision = None if adapter is None else f"bench-{profile.key.adapter[:12]}"
        if adapter is not None and revision is not None:
            self.runner.add_adapter(revision, adapter, inspected=True)
        try:
            yield Watched(self, profile, revision)
        finally:
            if revision is not None:
                self.runner.remove_adapter(revision)


def tests(profile: Profile) -> dict[str, tuple[str, ...]]:
    """Test name to its signals: fused, fused without confidence, and every signal alone."""
    fused = profile.fused
    attention = tuple(name for name in fused if SIGNALS[name].attention)
    return {FUSED: fused, ATTENTION: attention, **{name: (name,) for name in profile.signals}}


def ablations(profile: Profile) -> dict[str, tuple[str, ...]]:
    """The fused test with one of its signals left out each."""
    fused = profile.fused
    return {f"without {name}": tuple(n for n in fused if n != name) for name in fused if len(fused) > 1}


def bucket_grid(held_out: int) -> np.ndarray:
    """The p-values i / (n + 1), i = 1 .. n, that n held-out requests have among themselves, float64 [n]."""
    return np.arange(1, held_out + 1) / (held_out + 1)
