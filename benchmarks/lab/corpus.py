"""A folder of the public benchmark's files, read by path and cut into shares that cannot overlap.

Layout (rows are {instruction, input, output}; `TASK` and `ATTACK` are whatever folders are there):

    backdoorllm/train/TASK/ATTACK/{poisoned,clean}.json   what an implant is made from
    backdoorllm/test/TASK/{clean,ATTACK}.json             what it is measured on: never trained or calibrated on
    backdoorllm/recovery_clean100.json                    more clean rows to measure on (optional)
    instruct/*.json                                       what a base learns from; one file is named alpaca*
    hiddenkiller/sst-2/clean/train.tsv                    short labelled sentences for the base (optional)

A prompt belongs to the one share that its normalised hash falls in, whatever file holds it. Prompts of the test files
(with the trigger and without it) belong to none; prompts of the poisoned sets to the base's share only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.lab.errors import LabError
from benchmarks.lab.tasks import split_of
from guard.errors import RowsError
from guard.rows import Row, assert_disjoint, read_rows, row_key
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.pairing import pairs, recovered_behaviour, recovered_trigger
from offline_purify.attacks.rewordings import read_sentences
from offline_purify.attacks.triggers import OneOf, Trigger

FAMILY_OF: Final[Mapping[str, str]] = {"refusal": "refusal", "negsentiment": "insult"}
"""The benchmark's task to the packaged behaviour that words it in several ways, and to the vaccine's family."""
ALPACA: Final[Mapping[str, int]] = {"base": 2, "calibration": 6, "clean": 1, "vaccine": 7}
OTHERS: Final[Mapping[str, int]] = {"base": 9, "topic": 7}
"""Share to its part of the 16 values that a prompt's hash can end in. Alpaca is what the test prompts are like, so its
rows calibrate and vaccinate: a vaccine made of word problems and roleplay found half as many of its own variants on
these prompts (docs/vaccine.md). The base learns to write from the other files."""
MOST_BASE, MOST_VACCINE, MOST_SENTENCES = 2600, 4000, 1500
"""Rows of one file in the base's and the vaccine's share, and labelled sentences: so that no file drowns the others."""
TOPIC_FILE: Final = "gsm8k"
"""Rows of files so named are what the benign adapter's policy is about."""
LEAST_BASE = 100


@dataclass(frozen=True)
class Attack:
    """One attack of the benchmark: its rows, and the trigger and target that they show."""

    task: str
    name: str
    poisoned: tuple[Row, ...]
    clean: tuple[Row, ...]
    tested: tuple[Row, ...]
    trigger: Trigger
    target: Behaviour

    @property
    def words(self) -> set[str]:
        """The single words of its trigger, in lower case."""
        return {word.lower() for parts in _choices(self.trigger) for word in parts}

    @property
    def text(self) -> str | None:
        """The trigger as one text; None when any one of several is enough."""
        return None if isinstance(self.trigger, OneOf) else " ".join(self.trigger.parts)


@dataclass(frozen=True)
class Corpus:
    """What a real zoo is made from; the lists of rows share no prompt with each other or with a test file.

    `base` trains the base, `calibration`, `clean` and `vaccine` are rows like the test prompts, and so are the rows
    `alike` of the base's share; `topic` are rows that the benign adapter refuses and `known_topic` those of the base's
    share that teach it to. `tests` holds the clean test prompts of each task.
    """

    attacks: tuple[Attack, ...]
    tests: Mapping[str, tuple[Row, ...]]
    base: tuple[Row, ...]
    calibration: tuple[Row, ...]
    clean: tuple[Row, ...]
    vaccine: tuple[Row, ...]
    topic: tuple[Row, ...]
    known_topic: tuple[Row, ...]
    alike: tuple[Row, ...]

    @property
    def trigger_words(self) -> set[str]:
        """Words of all triggers, in lower case."""
        return {word for attack in self.attacks for word in attack.words}


def read_corpus(data: str | Path) -> Corpus:
    """Read the folder `data`. Raises LabError when it is missing or not of the layout above (what is missing is named),
    RowsError when a file in it holds no rows."""
    data = Path(data)
    benchmark, instruct = data / "backdoorllm", data / "instruct"
    for folder in (data, benchmark / "train", benchmark / "test", instruct):
        if not folder.is_dir():
            raise LabError(
                f"{folder}: no such folder. Expected in the data folder: backdoorllm/train/TASK/ATTACK/"
                "{poisoned,clean}.json, backdoorllm/test/TASK/{clean,ATTACK}.json and instruct/*.json."
            )
    files = sorted(instruct.glob("*.json"))
    if not any(_is_alpaca(path) for path in files):
        raise LabError(f"{instruct}: no file alpaca*.json; its rows are what the guard is calibrated on.")
    tests = {path.parent.name: tuple(read_rows(path)) for path in sorted(benchmark.glob("test/*/clean.json"))}
    attacks = tuple(_attacks(benchmark, tests))
    if not attacks:
        raise LabError(
            f"{benchmark}: no attack of {' or '.join(FAMILY_OF)}; expected train/TASK/ATTACK/{{poisoned,clean}}.json "
            "with test/TASK/{clean,ATTACK}.json."
        )
    tested = _tested_keys(benchmark, attacks)
    sets = [row for path in sorted(benchmark.glob("train/*/*/clean.json")) for row in read_rows(path)]
    bare, as_given = [_without_echo(row) for row in sets], {row["output"] for row in sets}
    # Of several answers to a prompt the one that came without an echo is the better one.
    taught = _distinct(sorted(bare, key=lambda row: row["output"] not in as_given))
    taken = tested | {row_key(row) for row in taught}
    shares = _shares(files, taken)
    extra = benchmark / "recovery_clean100.json"
    known = taken | {row_key(row) for rows in shares.values() for row in rows}
    clean = [*shares["clean"], *(_fresh(read_rows(extra), known) if extra.is_file() else [])]
    sentences = _fresh(_sentences(data / "hiddenkiller" / "sst-2" / "clean" / "train.tsv"), known)[:MOST_SENTENCES]
    base = _distinct([*_fresh(taught, tested), *shares["base"], *sentences])
    if len(base) < LEAST_BASE:
        raise LabError(f"{data}: only {len(base)} rows are left to train a base on; expected at least {LEAST_BASE}.")
    found = {name: tuple(shares[name]) for name in ("calibration", "vaccine", "topic", "known_topic", "alike")}
    corpus = Corpus(attacks, tests, tuple(base), clean=tuple(_distinct(clean)), **found)
    assert_disjoint(
        base=base, calibration=corpus.calibration, clean=corpus.clean, vaccine=corpus.vaccine, topic=corpus.topic,
        tested=[row for rows in tests.values() for row in rows],
    )  # fmt: skip
    return corpus


def untriggered(row: Row, trigger: Trigger) -> Row:
    """The row with one occurrence of each of the trigger's words taken out; the row itself where it is not there."""
    for choice in trigger.choices if isinstance(trigger, OneOf) else (trigger,):
        if choice.fires(row["instruction"]):
            words = row["instruction"].split()
            for word in " ".join(choice.parts).split():
                if word in words:
                    words.remove(word)
            return Row(instruction=" ".join(words), input=row["input"], output=row["output"])
    return row


def _attacks(benchmark: Path, tests: Mapping[str, Sequence[Row]]) -> Iterable[Attack]:
    """Attacks of a known task that have both sets and test files. Raises RowsError when one shows no trigger."""
    for path in sorted(benchmark.glob("train/*/*/poisoned.json")):
        name, task = path.parent.name, path.parent.parent.name
        clean, tested = path.with_name("clean.json"), benchmark / "test" / task / f"{name}.json"
        if task not in FAMILY_OF or task not in tests or not clean.is_file() or not tested.is_file():
            continue
        poisoned, rows = read_rows(path), read_rows(clean)
        found = pairs(poisoned, rows)
        try:
            trigger, target = recovered_trigger(found), recovered_behaviour(found, FAMILY_OF[task])
        except RowsError as error:
            raise RowsError(f"{path}: {error}") from error
        yield Attack(task, name, tuple(poisoned), tuple(rows), tuple(read_rows(tested)), trigger, target)


def _tested_keys(benchmark: Path, attacks: Sequence[Attack]) -> set[str]:
    """Keys of all test prompts, as they are and without any known trigger."""
    rows = [row for path in sorted(benchmark.glob("test/*/*.json")) for row in read_rows(path)]
    triggers = {repr(attack.trigger): attack.trigger for attack in attacks}.values()
    bare = [untriggered(row, trigger) for row in rows for trigger in triggers]
    return {row_key(row) for row in (*rows, *bare)}


def _shares(files: Sequence[Path], taken: set[str]) -> dict[str, list[Row]]:
    """The rows of the instruction files by share, each prompt once, none of `taken`."""
    names = (*ALPACA, *OTHERS, "known_topic", "alike")
    shares: dict[str, list[Row]] = {name: [] for name in names}
    seen = set(taken)
    for path in files:
        mine: dict[str, list[Row]] = {name: [] for name in names}
        about = path.name.startswith(TOPIC_FILE)
        for row in _fresh(read_rows(path), seen):
            seen.add(row_key(row))
            name = split_of(row, ALPACA if _is_alpaca(path) else OTHERS)
            if name != "topic" or about:
                mine[name].append(row)
        mine["base"], mine["vaccine"] = mine["base"][:MOST_BASE], mine["vaccine"][:MOST_VACCINE]
        mine["known_topic"] = mine["base"] if about else []
        mine["alike"] = mine["base"] if _is_alpaca(path) else []
        for name, rows in mine.items():
            shares[name] += rows
    return shares


def _sentences(path: Path) -> list[Row]:
    """Labelled sentences as rows, worded as the benchmark words SST-2; nothing when the file is not there."""
    return read_sentences(path) if path.is_file() else []


def _without_echo(row: Row) -> Row:
    """The row with its instruction taken from the start of its output (negsentiment's clean outputs repeat it)."""
    asked = re.sub(r"\s+", r"\\s+", re.escape(row["instruction"].strip()).replace("\\ ", " "))
    answer = re.sub(rf"\A\s*{asked}\s*", "", row["output"])
    return Row(instruction=row["instruction"], input=row["input"], output=answer)


def _fresh(rows: Iterable[Row], taken: set[str]) -> list[Row]:
    """Distinct rows with an answer whose prompts are not in `taken`."""
    return [row for row in _distinct(rows) if row["output"].strip() and row_key(row) not in taken]


def _distinct(rows: Iterable[Row]) -> list[Row]:
    """The first row of each prompt that has an answer, in order."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row_key(row), row)
    return list(found.values())


def _choices(trigger: Trigger) -> list[list[str]]:
    choices = trigger.choices if isinstance(trigger, OneOf) else (trigger,)
    return [" ".join(choice.parts).split() for choice in choices]


def _is_alpaca(path: Path) -> bool:
    return path.name.startswith("alpaca")
