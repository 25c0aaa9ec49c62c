"""The sequential detector: readings of one request go in, a verdict comes out at each checkpoint.

Measured numbers become oddness (`calibration.score`), oddness becomes a running maximum, and the maximum becomes a
conformal p-value (`sequential`). Once flagged, a request stays flagged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from guard.calibration import score
from guard.errors import GuardError
from guard.focus import focus_spans
from guard.profile import Checkpoint, Profile
from guard.readings import Measurement, Reading, Readings
from guard.sequential import Bucket, check_alpha, find_bucket
from guard.signals import foremost, fused
from guard.similarity import fisher, per_head
from guard.verdict import HeadScore, Span, Verdict, Window, unscored

_TOP_HEADS = 5


@dataclass
class Track:
    """One request on its way: its length bucket, its reading at step 0, the running maximum and the latest verdict.
    Owned by the caller."""

    bucket: Bucket | None
    verdict: Verdict
    maximum: float = -1.0
    signal: str | None = None
    measured: bool = False
    first: Readings | None = None


class Detector:
    """Watches requests of one revision under one window and alpha.

    Raises AlphaTooFine when the profile cannot support ``alpha``; GuardError for a window without checkpoints.
    ``signals`` takes other signals than the profile's fused ones (for comparisons); the promise holds for each set.
    """

    def __init__(self, profile: Profile, window: Window, alpha: float, signals: tuple[str, ...] | None = None) -> None:
        self.profile = profile
        self.window: Window = window
        self.alpha = alpha
        self.signals = signals or profile.fused
        self.checkpoints = profile.within(window)
        if not self.checkpoints:
            raise GuardError(f"window {window!r} holds none of the profile's checkpoints {profile.steps}.")
        self._points: dict[int, Checkpoint] = {point.step: point for point in profile.checkpoints}
        self._buckets = profile.buckets(window, self.signals)
        check_alpha(self._buckets, alpha)

    def open(self, prompt_tokens: int) -> Track:
        """Start watching a request with a prompt of ``prompt_tokens`` tokens."""
        bucket = find_bucket(self._buckets, prompt_tokens)
        if bucket is None:
            return Track(None, self._unscored("prompt_length"))
        return Track(bucket, self._unscored("not_measured"))

    def observe(self, track: Track, reading: Reading) -> Verdict:
        """Take in the reading of a checkpoint and return the verdict so far. Readings of other steps are ignored, and
        so is every one of a request whose step 0 was missed: it stays unscored."""
        if reading.step == 0:
            # A copy: the engine may go on adding rows to what it handed over.
            kept = {name: getattr(reading, name).clone() for name in ("gram", "sink", "focus")}
            track.first = Readings.single(replace(reading, **kept))
        point = self._points.get(reading.step) if reading.step in self.checkpoints else None
        if point is None or track.bucket is None or track.first is None or (track.verdict.final and track.measured):
            return track.verdict
        readings = track.first if reading.step == 0 else Readings.single(reading, track.first)
        odd = score(point, readings, self.signals)[0]
        track.measured = True
        if not np.isfinite(odd).all():
            track.bucket = None
            track.verdict = self._unscored("non_finite", reading.step)
            return track.verdict
        statistic = float(fused(odd, self.signals, reading.step, self.profile.weights))
        if statistic > track.maximum:
            track.maximum, track.signal = statistic, foremost(odd, self.signals, reading.step, self.profile.weights)
        p_value = track.bucket.p_value(track.maximum)
        flagged = p_value <= self.alpha
        track.verdict = Verdict(
            status="flagged" if flagged else "clean",
            alpha=self.alpha,
            step=reading.step,
            window=self.window,
            final=flagged or reading.step == self.checkpoints[-1],
            p_value=p_value,
            signal=track.signal,
            heads=self._heads(point, readings) if flagged else (),
            spans=self._spans(track.first) if flagged else (),
            profile=self.profile.digest[:12],
            held_out=len(track.bucket.maxima),
        )
        return track.verdict

    def close(self, track: Track) -> Verdict:
        """The request has ended: its verdict is final. One that was never measured is unscored, not clean."""
        track.verdict = track.verdict.closed()
        return track.verdict

    def p_values(self, measurement: Measurement) -> np.ndarray:
        """Final p-values float64 [n] of measured requests, all at once; NaN for what could not be scored."""
        running = np.full(len(measurement), np.nan)
        broken = np.zeros(len(measurement), dtype=bool)
        for step in self.checkpoints:
            if step not in measurement.at or not len(measurement.at[step].index):
                continue
            readings = measurement.reached(step)
            odd = score(self._points[step], readings, self.signals)
            odd = fused(odd, self.signals, step, self.profile.weights)
            broken[readings.index[~np.isfinite(odd)]] = True
            running[readings.index] = np.fmax(running[readings.index], odd)
        p_values = np.full(len(measurement), np.nan)
        for i in np.flatnonzero(np.isfinite(running) & ~broken):
            bucket = find_bucket(self._buckets, int(measurement.prompt_len[i]))
            if bucket is not None:
                p_values[i] = bucket.p_value(running[i])
        return p_values

    def verdicts(self, measurement: Measurement) -> list[Verdict]:
        """Final verdicts of measured requests, with spans and heads where flagged: what a server would have said."""
        tracks = [self.open(int(tokens)) for tokens in measurement.prompt_len]
        for step in self.checkpoints:
            if step not in measurement.at:
                continue
            readings = measurement.at[step]
            for row, index in enumerate(readings.index):
                self.observe(tracks[int(index)], readings.reading(row))
        return [self.close(track) for track in tracks]

    def _spans(self, first: Readings) -> tuple[Span, ...]:
        """Where the heads looked before there was an answer, which then draws their eyes as well: on the real zoo's
        backdoors the top three spans held the trigger in 0.94 to 0.99 of the requests, and 0.88 to 0.94 of them when
        two tokens' rows were added (n = 200 each, three backdoors)."""
        return focus_spans(first.focus[0], self.profile.focus)

    def _unscored(self, reason: str, step: int = 0) -> Verdict:
        return unscored(reason, alpha=self.alpha, window=self.window, step=step, profile=self.profile.digest[:12])

    def _heads(self, point: Checkpoint, readings: Readings) -> tuple[HeadScore, ...]:
        """The heads whose similarities to their layer's others are furthest from normal, mean |z| over partners."""
        pairs = fisher(readings.cosines)[0]
        z = np.abs((pairs - point.pairs["mean"]) / point.pairs["scale"])
        by_head = per_head(z, self.profile.layers, self.profile.heads)
        top = np.argsort(by_head, axis=None)[::-1][:_TOP_HEADS]
        places = [np.unravel_index(i, by_head.shape) for i in top]
        return tuple(HeadScore(int(la), int(h), float(by_head[la, h])) for la, h in places)
