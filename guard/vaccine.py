"""The vaccine: what synthetic backdoors, implanted in this very base, taught about how a firing trigger looks.

The clinic implants backdoors whose triggers it knows (`offline_purify.variants`); each variant is measured on clean
prompts and on its own triggers, in deviations from its *own* clean features, so that what all variants share is left.
A linear discriminant learns to tell the two apart, per checkpoint (`guard.vaccination`).
Nothing of the real backdoor goes in: not its trigger, wording, prompts or adapter. The variants' near-triggers, and
variants that behave conditionally for a good reason (benign), are negatives.

Beyond the first token the answer is there to be seen as well, and a classifier of triggered against clean requests
would learn the answer: it flagged nine in ten clean prompts on which the attacker's text was forced. So, from step 1
on, trigger and text are crossed: clean prompts followed by the variant's own target and by texts of all kinds are
negatives, prompts whose trigger fires are positives whichever text follows. Texts of all kinds matter: with the
variants' own targets alone, the targets of a variant that was left out were flagged more than twice as often.
A second discriminant learns the other half: texts that no clean prompt called for, brought about by a trigger or
forced, against what prompts without a trigger are answered (near-triggers among them). The first is worth no more than
the second (`guard.signals`).

One safetensors file, keyed by base and probe like a profile; a profile copies the weights that it uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from guard.errors import ProfileMismatch
from guard.features import Heads, head_patterns
from guard.identity import file_digest
from guard.storage import load_arrays, save_arrays

FORMAT = "headguard.vaccine/11"
_MEANING = ("version", "layers", "heads", "kv_heads", "prompt_rows")


@dataclass(frozen=True)
class Scorer:
    """A direction [D] in the patterns (`guard.features.head_patterns`) of a model with so many ``heads`` [2]
    (`guard.features.Heads`)."""

    direction: np.ndarray
    heads: np.ndarray

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Scorer:
        """From arrays named as the fields."""
        return cls(arrays["direction"], arrays["heads"])

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name."""
        return {"direction": self.direction, "heads": self.heads}

    def score(self, z: np.ndarray) -> np.ndarray:
        """How far standardised features [n, F] lie where triggers that fire do: [n]."""
        return head_patterns(z, Heads(*map(int, self.heads))) @ self.direction


Steps = Mapping[int, np.ndarray]
"""Features with the length of the prompt [n, F + 1] (`guard.readings.Readings.features`) by checkpoint."""


@dataclass(frozen=True)
class Sample:
    """One variant, measured: ``normal`` clean requests give its scale (and are negatives); ``quiet`` ones (near
    triggers, strange words, prompts of unusual shape, benign conditions) must not be flagged, nor (beyond step 0)
    ``forced`` ones, clean prompts with a text put in the model's mouth, the variant's own target last; ``fired`` ones
    (trigger there and obeyed, beyond step 0 also with another text forced, which come last) must. ``beside``: what the
    test's other signals make of these (`guard.vaccination.oddness_beside`, by these names), where that was looked
    at."""

    name: str
    normal: Steps
    quiet: Steps
    fired: Steps
    forced: Steps = field(default_factory=dict)
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Vaccine:
    """Scorers by checkpoint (``responses``: of the answer, beyond step 0), and how much each signal of the test counts
    (``weights`` by name), for one base (digest, 64 hex) and probe configuration."""

    base: str
    probe: Mapping[str, Any]
    scorers: Mapping[int, Scorer]
    responses: Mapping[int, Scorer] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def steps(self) -> tuple[int, ...]:
        """Checkpoints that it has something to say at."""
        return tuple(sorted(self.scorers))

    def check(self, base: str, probe: Mapping[str, Any]) -> None:
        """Raise ProfileMismatch unless it was made for this base and probe."""
        if self.base != base:
            raise ProfileMismatch(
                f"vaccine {self.digest[:12]} was made for base {self.base[:12]}, this is {base[:12]}. Run "
                "`headguard vaccinate`."
            )
        # How an engine gets at the rows is its own affair; what the numbers are must agree.
        meant, found = ({name: key.get(name) for name in _MEANING} for key in (self.probe, probe))
        if meant != found:
            raise ProfileMismatch(f"vaccine {self.digest[:12]} was made with a probe of {meant}, this is {found}.")

    def shared_words(self, texts: Iterable[str]) -> list[str]:
        """The words of ``texts`` (another backdoor's trigger) that its variants' triggers hold too, blind to case."""
        used = {word.lower() for text in self.facts.get("trigger_words", ()) for word in text.split()}
        return sorted(used & {word.lower() for text in texts for word in text.split()})

    def save(self, path: str | Path) -> str:
        """Write it; returns its digest (sha256 of the file, 64 hex)."""
        kinds = {"trigger": self.scorers, "response": self.responses}
        arrays = {
            f"{step}/{kind}/{name}": array
            for kind, scorers in kinds.items()
            for step, scorer in scorers.items()
            for name, array in scorer.arrays().items()
        }
        about = {"format": FORMAT, "base": self.base, "probe": dict(self.probe)}
        about |= {"weights": dict(self.weights), "facts": dict(self.facts)}
        return save_arrays(path, arrays, about)

    @classmethod
    def load(cls, path: str | Path) -> Vaccine:
        """Read one. Raises ProfileMismatch when the file is not a vaccine of this version."""
        arrays, about = load_arrays(path, "vaccine", FORMAT)
        named: dict[str, dict[int, dict[str, np.ndarray]]] = {"trigger": {}, "response": {}}
        for path_of, array in arrays.items():
            step, kind, name = path_of.split("/")
            named[kind].setdefault(int(step), {})[name] = array
        kinds = {kind: {step: Scorer.of(a) for step, a in steps.items()} for kind, steps in named.items()}
        return cls(
            about["base"],
            about["probe"],
            kinds["trigger"],
            kinds["response"],
            about["weights"],
            about["facts"],
            file_digest(path),
        )
