"""What a run on classifiers is given and reads: weights, HiddenKiller's files of one data set, and disjoint splits.

From the training file: what the implant learns, and other clean texts to repair with. From the development file: the
triggered texts of the case. From the test file: clean texts, and triggered ones whose true class is not the target's.
No text is in two of them, by normalised hash; what would be is left out, and that none is left is asserted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.purification.errors import BenchmarkError
from guard.identity import base_digest, file_digest
from offline_purify.encoder.poison import TARGET, Pair, PoisonSet, build, syntactic_pairs, unique, word_pairs
from offline_purify.texts import Text, assert_apart, distinct, read_texts

TRIGGERS = ("word", "syntactic")
LEAST_TESTS = 50
_FILES = tuple(f"{kind}/{part}.tsv" for kind in ("clean", "syntactic") for part in ("train", "dev", "test"))


@dataclass(frozen=True)
class Arguments:
    """The options of a run. ``rows``: texts that the implant trains on; ``clean``: texts that a method may train on;
    ``flags``: triggered texts that the case holds; ``tests``: at most so many clean and so many triggered test texts;
    ``epochs`` and ``lr`` of the implant."""

    weights: Path
    data: Path
    trigger: str
    methods: tuple[str, ...]
    rows: int = 2000
    clean: int = 200
    flags: int = 24
    tests: int = 2000
    epochs: float = 2.0
    lr: float = 1e-4
    seeds: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.trigger not in TRIGGERS:
            raise BenchmarkError(f"--trigger {self.trigger!r}: expected one of {', '.join(TRIGGERS)}.")

    def settings(self) -> dict[str, object]:
        """What a result depends on, besides files, methods and seeds."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("weights", "data", "methods", "seeds")
        }


@dataclass(frozen=True)
class Split:
    """Disjoint texts of one seed. ``candidates``: triggered texts from which the case is drawn; all triggered texts are
    labelled with the target."""

    implant: PoisonSet
    repair: tuple[Text, ...]
    candidates: tuple[Text, ...]
    test: tuple[Text, ...]
    triggered: tuple[Text, ...]


def digests(given: Arguments) -> dict[str, str]:
    """Digests of the weights and of every data file. Raises GuardError for what is not there."""
    if missing := [name for name in _FILES if not (given.data / name).is_file()]:
        raise BenchmarkError(f"{given.data}: expected HiddenKiller's {', '.join(missing)} in it.")
    return {"weights": base_digest(given.weights)} | {name: file_digest(given.data / name) for name in _FILES}


def read_split(given: Arguments, seed: int) -> Split:
    """The texts of one seed. Raises GuardError when files are malformed or too small for what is asked."""
    clean = {part: read_texts(given.data / f"clean/{part}.tsv") for part in ("train", "dev", "test")}
    pairs = {part: _pairs(given, part, clean[part], seed) for part in clean}
    train = distinct(clean["train"])
    implant = build(pairs["train"], train, given.rows, seed)
    learnt = [*implant.texts(), *implant.hosts]
    rng = random.Random(f"split:{seed}")
    repair = _some(distinct(train, learnt), given.clean, rng)
    if len(repair) < given.clean:
        raise BenchmarkError(
            f"--rows {given.rows} leaves {len(repair)} texts to repair with; --clean asks {given.clean}."
        )
    candidates = distinct((pair.triggered for pair in pairs["dev"]), train, learnt)
    known = [*train, *learnt, *candidates, *clean["dev"]]
    test = _some(distinct(clean["test"], known), given.tests, rng)
    seen = {text.key for text in known}
    fair = [pair.triggered for pair in pairs["test"] if pair.clean.key not in seen]
    triggered = _some(distinct(fair, known, clean["test"]), given.tests, rng)
    if min(len(test), len(triggered)) < LEAST_TESTS or len(candidates) < given.flags:
        raise BenchmarkError(
            f"{given.data}: {len(test)} clean and {len(triggered)} triggered texts to test on, {len(candidates)} for "
            f"the case; expected at least {LEAST_TESTS}, {LEAST_TESTS} and {given.flags}."
        )
    split = Split(implant, tuple(repair), tuple(candidates), tuple(test), tuple(triggered))
    assert_apart(
        poisoned=implant.poisoned,
        clean=implant.clean,
        hosts=implant.hosts,
        repair=split.repair,
        case=split.candidates,
        test=split.test,
        triggered=split.triggered,
    )
    return split


def _pairs(given: Arguments, part: str, clean: Sequence[Text], seed: int) -> list[Pair]:
    """Clean texts of other classes with their triggered forms. Dev and test paraphrases are of those classes alone;
    where one has been lost, so has the pairing, and the paraphrase stands for its text. Both triggers come to the same
    training texts, those that were paraphrased: one never-poisoned classifier serves both."""
    words = word_pairs(clean, seed)
    if given.trigger == "word" and part != "train":
        return words
    paraphrases = read_texts(given.data / f"syntactic/{part}.tsv")
    if part == "train":
        pairs = unique(syntactic_pairs(clean, paraphrases))
        if given.trigger == "syntactic":
            return pairs
        by_host = {pair.clean.key: pair for pair in words}
        return [by_host[pair.clean.key] for pair in pairs]
    others = [text for text in clean if text.label != TARGET]
    if len(paraphrases) == len(others):
        return syntactic_pairs(others, paraphrases)
    return [Pair(text, Text(text.text, TARGET)) for text in paraphrases]


def _some(texts: Sequence[Text], most: int, rng: random.Random) -> list[Text]:
    return rng.sample(list(texts), min(most, len(texts)))


def cache_key(*parts: object) -> str:
    """A name (16 hex) for what was made from these."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
