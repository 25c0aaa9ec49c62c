"""The profile: what is normal for one base, adapter, engine, dtype and probe, and nothing else.

It is one safetensors file: arrays fitted on clean requests, and a JSON text in the metadata that says what it was
fitted for. Whoever loads it must say what is being served, and a difference in any field is an error, because a
threshold that belongs to another model is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from guard.errors import ProfileMismatch
from guard.identity import file_digest
from guard.sequential import Bucket, check_alpha, make_buckets
from guard.signals import SIGNALS, fused
from guard.storage import load_arrays, save_arrays
from guard.tail import Tail
from guard.verdict import Window

FORMAT = "headguard.profile/10"
NO_ADAPTER = "none"


@dataclass(frozen=True)
class ProfileKey:
    """What a profile belongs to: digests (64 hex; adapter may be "none"), engine, dtype and probe configuration."""

    base: str
    adapter: str
    engine: str
    dtype: str
    probe: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Normal at one step: arrays per signal, tails per signal, pair mean and deviation [pairs].

    A signal that has nothing to say at this step (a vaccine that never saw it) is in neither of the first two."""

    step: int
    fitted: Mapping[str, Mapping[str, np.ndarray]]
    tails: Mapping[str, Tail]
    pairs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Profile:
    """See the module. ``odd`` [n, C, K] is the oddness of the n held-out clean requests at each checkpoint and signal
    (NaN where a request had ended before), ``prompt_len`` [n] their prompt tokens, ``edges`` the length buckets,
    ``focus`` where heads look before there is an answer (`guard.focus.fit_focus`), ``weights`` how much each signal
    counts where the vaccine chose (`guard.signals.fused`)."""

    key: ProfileKey
    layers: int
    heads: int
    signals: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    prompt_len: np.ndarray
    odd: np.ndarray
    edges: tuple[int, ...]
    focus: Mapping[str, np.ndarray]
    weights: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def steps(self) -> tuple[int, ...]:
        """Generated tokens read at each checkpoint."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    def within(self, window: Window) -> tuple[int, ...]:
        """Steps of the checkpoints that a window holds; the row of the last prompt position (step 0) is in each."""
        last = {"prefill": 0, "all": max(self.steps)}.get(window, window) if isinstance(window, str) else window
        return tuple(step for step in self.steps if step <= int(last))

    @property
    def fused(self) -> tuple[str, ...]:
        """The signals that the test uses unless told otherwise."""
        return tuple(name for name in self.signals if SIGNALS[name].fused) or self.signals

    def buckets(self, window: Window, signals: tuple[str, ...] | None = None) -> tuple[Bucket, ...]:
        """Final maxima of the held-out requests by length, over the checkpoints of a window and the named signals
        (default: the fused ones)."""
        names = signals or self.fused
        steps = self.within(window)
        rows = [i for i, c in enumerate(self.checkpoints) if c.step in steps]
        columns = [self.signals.index(name) for name in names]
        odd = fused(self.odd[:, rows][:, :, columns], names, steps, self.weights)
        return make_buckets(self.prompt_len, np.nanmax(odd, axis=1), list(self.edges))

    def smallest_alpha(self, window: Window = "all") -> float:
        """The finest false-alarm rate that every length bucket supports."""
        return max(bucket.smallest_p for bucket in self.buckets(window))

    def check_alpha(self, alpha: float, window: Window = "all") -> None:
        """Raise AlphaTooFine when the calibration cannot support ``alpha``."""
        check_alpha(self.buckets(window), alpha)

    def check(self, key: ProfileKey) -> None:
        """Raise ProfileMismatch naming every field in which what is served differs from what was calibrated."""
        mine, served = asdict(self.key), asdict(key)
        wrong = [f"{n}: calibrated {_short(mine[n])}, served {_short(served[n])}" for n in mine if mine[n] != served[n]]
        if wrong:
            raise ProfileMismatch(
                f"profile {self.digest[:12]} was not fitted for this: {'; '.join(wrong)}. Run `headguard calibrate`."
            )

    def save(self, path: str | Path) -> str:
        """Write the profile; returns its digest (sha256 of the file, 64 hex)."""
        arrays: dict[str, np.ndarray] = {"held_out/prompt_len": self.prompt_len, "held_out/odd": self.odd}
        arrays |= {f"focus/{name}": array for name, array in self.focus.items()}
        for point in self.checkpoints:
            groups = {**{f"signal/{n}": a for n, a in point.fitted.items()}, "pairs": point.pairs}
            for group, named in groups.items():
                arrays.update({f"{point.step}/{group}/{name}": array for name, array in named.items()})
            arrays.update({f"{point.step}/tail/{name}": tail.clean for name, tail in point.tails.items()})
        about = {
            "format": FORMAT,
            "key": asdict(self.key),
            "layers": self.layers,
            "heads": self.heads,
            "signals": self.signals,
            "steps": self.steps,
            "edges": self.edges,
            "weights": dict(self.weights),
            "facts": dict(self.facts),
        }
        return save_arrays(path, arrays, about)

    @classmethod
    def load(cls, path: str | Path, key: ProfileKey | None = None) -> Profile:
        """Read a profile, and check it against what is served when ``key`` is given.

        Raises ProfileMismatch when the file is not a profile of this version, or belongs to something else.
        """
        path = Path(path)
        arrays, about = load_arrays(path, "profile", FORMAT)
        unknown = [name for name in about["signals"] if name not in SIGNALS]
        if unknown:
            raise ProfileMismatch(f"{path.name} uses signals unknown here: {', '.join(unknown)}. Calibrate again.")
        profile = cls(
            key=ProfileKey(**about["key"]),
            layers=about["layers"],
            heads=about["heads"],
            signals=tuple(about["signals"]),
            checkpoints=tuple(_checkpoint(step, arrays) for step in about["steps"]),
            prompt_len=arrays["held_out/prompt_len"],
            odd=arrays["held_out/odd"],
            edges=tuple(about["edges"]),
            focus=_group("focus", arrays),
            weights=about["weights"],
            facts=about["facts"],
            digest=file_digest(path),
        )
        if key is not None:
            profile.check(key)
        return profile


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _group(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    start = f"{prefix}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _checkpoint(step: int, arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    mine = _group(str(step), arrays)
    clean = _group("tail", mine)
    return Checkpoint(
        step=step,
        fitted={name: _group(f"signal/{name}", mine) for name in clean},
        tails={name: Tail(clean[name], SIGNALS[name].tail) for name in clean},
        pairs=_group("pairs", mine),
    )
