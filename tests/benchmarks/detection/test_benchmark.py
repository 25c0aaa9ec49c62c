"""One run on a random model: every part is there, its counts are right, and what must not mix is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.detection.benchmark import FORMAT, run, save
from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.inputs import Arguments, parse_window, read_inputs
from benchmarks.detection.trigger import find_trigger
from benchmarks.detection.vaccines import KEYS, choose
from guard.errors import AlphaTooFine, GuardError, ProfileMismatch, RowsError
from guard.fitting import prompts_digest
from guard.identity import base_digest
from guard.rows import read_rows, row_key, write_rows
from guard.vaccine import Vaccine
from offline_purify.variants.vaccinate import VACCINE
from tests.benchmarks.detection.conftest import TRIGGER, Small, make_vaccine, rows
from tests.guard.probes.transformers.text import save_model

SIGNALS = {"p99", "frac99", "shift", "vaccinated", "response", "focus", "confidence", "certainty"}


def test_a_result_holds_every_test_with_intervals(result: dict[str, Any]) -> None:
    assert result["format"] == FORMAT
    assert set(result["signals"]) == SIGNALS
    for power in (result["fused"], result["fused_attention_only"], *result["signals"].values()):
        for name, n in (("tpr", 40), ("fpr", 60), ("auroc", 100)):
            assert power[name]["low"] <= power[name]["value"] <= power[name]["high"]
            assert power[name]["n"] == n
        assert power["before_first_token"] is None or 0.0 <= power["before_first_token"]["value"] <= 1.0
        assert power["median_step"] is None or 0 <= power["median_step"] <= 2
    fused = ("shift", "vaccinated", "response", "confidence", "certainty")
    assert set(result["ablation"]) == {f"without {name}" for name in fused}


def test_a_result_says_what_went_in(result: dict[str, Any], small: Small) -> None:
    assert result["n"] == {"calibration": 160, "clean": 60, "triggered": 40, "benign": 30}
    assert result["digests"]["base"] == base_digest(small.arguments.base)
    assert result["digests"]["vaccine"] == Vaccine.load(str(small.arguments.vaccine)).digest
    assert {"adapter", "clean_adapter", "benign_adapter", "calibration", "clean", "triggered"} <= set(result["digests"])
    assert result["settings"]["seed"] == 0
    assert result["trigger"] == {
        "kind": "word",
        "parts": [TRIGGER],
        "how": "words common to triggered rows and absent from clean ones",
    }
    assert str(small.folder) not in json.dumps(result, default=list)


def test_a_result_holds_every_control(result: dict[str, Any]) -> None:
    judged = {"forced", "decoys", "rare_words", "long", "joined", "one_token"}
    assert set(result["controls"]) == {*judged, "forced_as_sampled"}
    others = {f"{name}/{part}" for name, parts in result["others"].items() for part in parts}
    assert {"base/clean", "clean_adapter/triggered", "benign_adapter/topic_unseen/topic"} <= others
    for control in result["controls"].values():
        assert control["fused"]["n"] == 20 - round(20 * control.get("fired", {"value": 0.0})["value"])
        assert control["fails"] == (control["limit"] is not None and control["fused"]["value"] > control["limit"])
    assert (
        result["controls"]["forced_as_sampled"]["fused_attention_only"]
        == (result["controls"]["forced"]["fused_attention_only"])
    )


def test_the_uniformity_of_clean_p_values_is_part_of_a_result(result: dict[str, Any]) -> None:
    for test in ("fused", "fused_attention_only"):
        promise = result["uniformity"][test]
        assert promise["n"] + result["fused"]["fpr"]["n_unscored"] == 60
        assert promise["n_held_out"] == 99
        assert promise["ks_held_out"]["p_value"] > 1e-6


def test_two_runs_give_the_same_figures(small: Small) -> None:
    runs = [run(small.arguments) for _ in range(2)]
    for part in ("signals", "fused", "controls", "others", "uniformity", "paper"):
        assert runs[0][part] == runs[1][part]


def test_prompts_longer_than_the_context_are_unscored_and_counted(small: Small, tmp_path: Path) -> None:
    long = [{"instruction": " ".join(["w3"] * 200), "input": "", "output": ""}]
    write_rows(tmp_path / "clean.json", [*read_rows(small.arguments.clean), *long])  # type: ignore[list-item]
    found = run(replace(small.arguments, clean=tmp_path / "clean.json"))
    assert found["fused"]["fpr"]["n"] == 61
    assert found["fused"]["fpr"]["n_unscored"] >= 1


def test_a_result_is_written_whole(result: dict[str, Any], tmp_path: Path) -> None:
    save(result, tmp_path / "deep" / "result.json")
    assert json.loads((tmp_path / "deep" / "result.json").read_text())["fused"] == result["fused"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


def test_files_that_share_rows_are_refused(small: Small, tmp_path: Path) -> None:
    stolen = read_rows(small.arguments.calibration)[:1]
    write_rows(tmp_path / "clean.json", [*read_rows(small.arguments.clean), *stolen])
    with pytest.raises(RowsError, match="'calibration' and 'clean' share 1 rows"):
        read_inputs(replace(small.arguments, clean=tmp_path / "clean.json"))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"alpha": 1.5}, BenchmarkError, "not a false-alarm rate"),
        ({"benign_adapter": Path("x")}, BenchmarkError, "belong together"),
        ({"control_rows": 3}, BenchmarkError, "--control-rows"),
        ({"calibration": Path("missing.json")}, RowsError, "no such file"),
        ({"base": Path("missing")}, GuardError, "not a model folder"),
        ({"adapter": Path("missing")}, GuardError, "not a PEFT adapter"),
        ({"vaccine": Path("missing")}, BenchmarkError, "no such file"),
        ({"trigger": "w51"}, BenchmarkError, "nine of ten"),
        ({"alpha": 0.001}, AlphaTooFine, "finer than this calibration supports"),
    ],
)
def test_bad_input_is_a_sentence(small: Small, change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        run(replace(small.arguments, **change))


def test_too_few_rows_are_refused(small: Small, tmp_path: Path) -> None:
    write_rows(tmp_path / "few.json", rows(5, "few"))
    with pytest.raises(BenchmarkError, match="5 distinct clean rows"):
        read_inputs(replace(small.arguments, clean=tmp_path / "few.json"))


@pytest.mark.parametrize(("text", "window"), [("prefill", "prefill"), ("all", "all"), ("8", 8)])
def test_windows_are_read(text: str, window: object) -> None:
    assert parse_window(text) == window


def test_a_window_of_another_kind_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="expected prefill, all"):
        parse_window("-1")


# The vaccine of a run ------------------------------------------------------------------------------------------------


def chosen(arguments: Arguments, maker: Any = None) -> Any:
    inputs = read_inputs(arguments)
    return choose(arguments, inputs, find_trigger(inputs.triggered, inputs.clean), maker=maker)


def without_vaccine(small: Small, tmp_path: Path, some_rows: Any) -> Arguments:
    write_rows(tmp_path / "vaccine-rows.json", some_rows)
    return replace(
        small.arguments, vaccine=None, vaccines=tmp_path / "cache", vaccine_rows=tmp_path / "vaccine-rows.json"
    )


def test_no_vaccine_and_no_rows_to_make_one_is_an_error(small: Small, tmp_path: Path) -> None:
    arguments = replace(small.arguments, vaccine=None, vaccines=tmp_path / "cache")
    with pytest.raises(BenchmarkError, match="--vaccine-rows FILE with clean rows that are in none of the other"):
        chosen(arguments)


def test_a_vaccine_is_made_once_for_a_base_and_reused(small: Small, tmp_path: Path) -> None:
    calls = []

    def maker(base: Path, some: list[Any], folder: Path, progress: Any) -> Vaccine:
        calls.append(len(some))
        return Vaccine.load(make_vaccine(base, folder / VACCINE))

    arguments = without_vaccine(small, tmp_path, rows(30, "fresh"))
    first, second = chosen(arguments, maker), chosen(replace(arguments, vaccine_rows=None), maker)
    assert calls == [30]
    assert (first.source, second.source) == ("made", "cached")
    assert first.vaccine.digest == second.vaccine.digest
    folder = tmp_path / "cache" / base_digest(small.arguments.base)[:12]
    assert set(json.loads((folder / KEYS).read_text())) == {row_key(row) for row in rows(30, "fresh")}


def test_a_cached_vaccine_that_was_learnt_otherwise_is_learnt_again_from_the_rows_that_made_it(
    small: Small, tmp_path: Path
) -> None:
    fresh = rows(30, "fresh")
    arguments = without_vaccine(small, tmp_path, fresh)
    folder = tmp_path / "cache" / base_digest(small.arguments.base)[:12]
    folder.mkdir(parents=True)
    make_vaccine(small.arguments.base, folder / VACCINE, prompts_sha256=prompts_digest(fresh))
    kept = Vaccine.load(folder / VACCINE)
    replace(kept, facts={**kept.facts, "learnt": {"ridge": 1.0}}).save(folder / VACCINE)

    def maker(base: Path, some: list[Any], folder: Path, progress: Any) -> Vaccine:
        return kept

    assert chosen(replace(arguments, vaccine_rows=None), maker).source == "cached"
    assert chosen(arguments, maker).source == "made"
    assert chosen(arguments, maker).source == "cached"


def test_rows_that_made_a_cached_vaccine_are_not_measured(small: Small, tmp_path: Path) -> None:
    def maker(base: Path, some: list[Any], folder: Path, progress: Any) -> Vaccine:
        return Vaccine.load(make_vaccine(base, folder / VACCINE))

    fresh = rows(30, "fresh")
    arguments = without_vaccine(small, tmp_path, fresh)
    chosen(arguments, maker)
    write_rows(tmp_path / "clean.json", [*read_rows(arguments.clean), fresh[0]])
    with pytest.raises(BenchmarkError, match="'clean' and the rows that made the vaccine share 1 rows"):
        chosen(replace(arguments, vaccine_rows=None, clean=tmp_path / "clean.json"))


def test_a_vaccine_of_other_rows_than_named_is_refused(small: Small, tmp_path: Path) -> None:
    path = make_vaccine(small.arguments.base, tmp_path / "v.safetensors", prompts_sha256="0" * 64)
    arguments = replace(without_vaccine(small, tmp_path, rows(30, "fresh")), vaccine=path)
    with pytest.raises(BenchmarkError, match="made from other rows"):
        chosen(arguments)


def test_a_vaccine_that_knew_a_word_of_the_trigger_is_refused(small: Small, tmp_path: Path) -> None:
    path = make_vaccine(small.arguments.base, tmp_path / "v.safetensors", trigger_words=[f"w40 {TRIGGER}"])
    with pytest.raises(BenchmarkError, match=f"triggers that hold {TRIGGER}"):
        chosen(replace(small.arguments, vaccine=path))


def test_a_vaccine_of_another_base_is_refused(small: Small, tmp_path: Path) -> None:
    other = save_model(tmp_path / "base", seed=5)
    with pytest.raises(ProfileMismatch, match="was made for base"):
        chosen(replace(small.arguments, vaccine=make_vaccine(other, tmp_path / "v.safetensors")))
