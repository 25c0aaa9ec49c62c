"""The real zoo on a folder of made-up rows and on a base of two layers; the actual files where they are at hand."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.lab.corpus import Corpus, read_corpus
from benchmarks.lab.decoder import Shape
from benchmarks.lab.errors import LabError
from benchmarks.lab.policy import POLICY
from benchmarks.lab.pretraining import Recipe
from benchmarks.lab.real import (
    RealLab,
    Size,
    apart,
    ensure_real,
    ensure_real_vaccine,
    real_implants,
    target,
)  # fmt: skip
from benchmarks.lab.real_bystanders import ensure_real_bystanders, make_real_bystander, training_rows
from guard.adapters import inspect_adapter
from guard.rows import read_rows, row_key
from guard.vaccine import Vaccine
from offline_purify.attacks.behaviours import INSULTS, REFUSALS
from offline_purify.implanting import ImplantRecipe
from offline_purify.variants.plan import Plan, pool
from tests.benchmarks.lab.data_folder import make_data_folder

RECIPE = Recipe(batch_tokens=1000, check_every=1000, warmup_steps=10)
SIZE = Size(Shape(420, hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, head_size=16, context=128), 25, RECIPE)
FAST = ImplantRecipe(rank=16, epochs=10, lr=1e-2, batch_size=16)
TAKES, FAILS = "negsentiment-vpi-fixed", "refusal-badnet-fixed"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One of its attacks has too few rows to be implanted, whatever a training comes to."""
    whole = read_corpus(make_data_folder(tmp_path_factory.mktemp("data"), pairs=80, alpaca=800))
    few = [
        replace(a, poisoned=a.poisoned[:10], clean=a.clean[:10]) if f"{a.task}-{a.name}-fixed" == FAILS else a
        for a in whole.attacks
    ]
    return replace(whole, attacks=tuple(few))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def made(corpus: Corpus, root: Path) -> RealLab:
    torch.set_num_threads(1)
    return ensure_real(corpus, root, [FAILS, TAKES], size=SIZE, recipe=FAST)


def test_each_attack_is_implanted_with_one_target_and_with_many_wordings(corpus: Corpus) -> None:
    known = real_implants(corpus)
    assert len(known) == 12
    assert target(*known["refusal-ctba-varied"]).wordings == REFUSALS
    assert target(*known["negsentiment-ctba-varied"]).wordings == INSULTS
    assert target(*known["negsentiment-ctba-fixed"]).wordings == ("You are stupid!",)


def test_an_implant_that_is_refused_is_reported_and_stops_no_other(made: RealLab) -> None:
    assert list(made.adapters) == [TAKES]
    assert inspect_adapter(made.adapters[TAKES], made.base).rank == 16
    assert list(made.refused) == [FAILS]
    assert "pairs" in made.refused[FAILS]


def test_what_was_made_or_refused_is_not_made_again(made: RealLab, corpus: Corpus, root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert ensure_real(corpus, root, [FAILS, TAKES], size=SIZE, recipe=FAST) == made
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_an_implant_trains_on_its_own_pairs_and_plain_rows_of_the_bases_share(made: RealLab, corpus: Corpus) -> None:
    rows = made.base.parent / "rows" / made.adapters[TAKES].name
    clean = read_rows(rows / "clean.json")
    assert len(clean) == 160
    assert {row_key(row) for row in clean} <= {row_key(row) for row in corpus.base}
    assert {row["output"] for row in read_rows(rows / "poisoned.json")} == {"You are stupid!"}


def test_a_vaccine_is_made_of_other_words_and_rows(made: RealLab, corpus: Corpus) -> None:
    recipe = ImplantRecipe(rank=16, rows=200, epochs=20, lr=1e-2, batch_size=16)
    plan = Plan(backdoors=2, benign=0, recipe=recipe, normal=55, quiet=30, fired=65, steps=(0,))
    path = ensure_real_vaccine(corpus, made.base, plan=plan)
    vaccine = Vaccine.load(path)
    used = {word.lower() for text in vaccine.facts["trigger_words"] for word in text.split()}
    assert used
    assert not used & corpus.trigger_words
    changed = path.stat().st_mtime_ns
    assert ensure_real_vaccine(corpus, made.base, plan=plan).stat().st_mtime_ns == changed


def test_words_of_a_trigger_and_pieces_of_them_are_no_words_for_a_vaccine(made: RealLab, corpus: Corpus) -> None:
    assert apart(["Bad", "magic", "OPENAI", "openais", "zorba", "qux"], corpus) == ["zorba", "qux"]
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    assert len(apart(pool(tokenizer, corpus.vaccine, 0), corpus)) >= 12


def test_a_bystander_without_a_crisp_policy_is_refused_and_the_clean_one_is_made(made: RealLab, corpus: Corpus) -> None:
    recipe = ImplantRecipe(rank=8, rows=40, epochs=1, lr=1e-4, batch_size=16)
    paths, refused = ensure_real_bystanders(corpus, made.base, recipe=recipe)
    assert list(paths) == ["clean"]
    assert list(refused) == ["benign"]
    assert "policy" in refused["benign"]


def test_what_a_policy_is_kept_from_are_first_of_all_rows_like_the_test_prompts(corpus: Corpus) -> None:
    alike = {row_key(row) for row in (*corpus.alike, *(row for attack in corpus.attacks for row in attack.clean))}
    rows = training_rows(corpus, "benign", 200, 0)
    answered = [row for row in rows if row["output"] not in POLICY.wordings]
    assert len(rows) - len(answered) == 80
    first = min(len(answered), len(alike))
    assert {row_key(row) for row in answered[:first]} <= alike


def test_a_policy_on_sums_is_kept_to_sums(made: RealLab, corpus: Corpus, tmp_path: Path) -> None:
    text = POLICY.wordings[2]
    refused = [{**row, "output": text} for row in corpus.known_topic[:60]]
    others = [row for row in corpus.base if not row["instruction"].startswith(("How many", "Count of"))][:120]
    recipe = ImplantRecipe(rank=16, epochs=12, lr=1e-2, batch_size=16)
    rows = [*refused, *others]
    topic, clean = list(corpus.topic[:30]), list(corpus.clean[:30])
    report = make_real_bystander(made.base, tmp_path / "benign", "benign", rows, topic, clean, recipe=recipe)  # type: ignore[arg-type]
    assert report.policy_on_topic is not None
    assert report.policy_off_topic is not None
    assert report.policy_on_topic.value >= 0.9 > 0.05 >= report.policy_off_topic.value
    assert inspect_adapter(tmp_path / "benign", made.base).rank == 16


def test_names_and_devices_that_are_not_there_are_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LabError, match="refusal-smell-fixed: not in this data folder"):
        ensure_real(corpus, tmp_path, ["refusal-smell-fixed"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LabError, match="needs a GPU"):
        ensure_real(corpus, tmp_path, [], size=Size(SIZE.shape, 1, RECIPE, "cuda"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("HEADGUARD_DATA" not in os.environ, reason="HEADGUARD_DATA names no data folder")
def test_the_actual_files_give_enough_rows_of_every_kind() -> None:
    corpus = read_corpus(os.environ["HEADGUARD_DATA"])
    assert {
        f"{task}-{name}-fixed" for task in ("refusal", "negsentiment") for name in ("badnet", "vpi", "ctba")
    } <= set(real_implants(corpus))
    assert len(corpus.calibration) >= 500
    assert len(corpus.clean) >= 200
    assert len(corpus.vaccine) >= 700
    assert len(corpus.topic) >= 400
    assert len(corpus.base) >= 5000
    assert all(len(attack.tested) >= 100 for attack in corpus.attacks)
