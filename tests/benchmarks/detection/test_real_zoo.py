"""The real zoo's rows, and what it says when there is nothing to make it from."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.detection import zoo
from benchmarks.detection.__main__ import app
from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.inputs import Arguments
from benchmarks.detection.patients import Patient, Zoo
from benchmarks.detection.real_zoo import real_files, real_zoo
from benchmarks.lab.corpus import read_corpus
from benchmarks.lab.real import real_implants
from guard.rows import assert_disjoint, read_rows
from offline_purify.attacks.behaviours import REFUSALS
from tests.benchmarks.detection.conftest import Small
from tests.benchmarks.lab.data_folder import TRIGGERS, make_data_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_folder(tmp_path_factory.mktemp("data"))


def test_files_hold_held_out_rows_and_the_benchmarks_own_test_prompts(data: Path, tmp_path: Path) -> None:
    corpus = read_corpus(data)
    attack, wording = real_implants(corpus)["refusal-ctba-varied"]
    files = real_files(corpus, attack, wording, "refusal-ctba-varied", tmp_path, 0)
    rows = {name: read_rows(path) for name, path in files.items()}
    assert_disjoint(**rows)
    assert {name: len(those) for name, those in rows.items()} == {
        "calibration": len(corpus.calibration),
        "clean": len(corpus.clean) + 30,
        "vaccine_rows": len(corpus.vaccine),
        "benign_rows": len(corpus.topic),
        "triggered": 30,
    }
    assert all(TRIGGERS["ctba"].fires(row["instruction"]) for row in rows["triggered"])
    assert len({row["output"] for row in rows["triggered"]} & set(REFUSALS)) > 3
    tested = read_rows(data / "backdoorllm/test/refusal/ctba.json")
    assert [row["instruction"] for row in rows["triggered"]] == [row["instruction"] for row in tested]


def test_two_implants_never_share_a_file_that_differs(data: Path, tmp_path: Path) -> None:
    corpus = read_corpus(data)
    known = real_implants(corpus)
    one, two = (
        real_files(corpus, *known[name], name, tmp_path, 0) for name in ("refusal-vpi-fixed", "negsentiment-vpi-fixed")
    )
    assert {name for name in one if one[name] == two[name]} == {"calibration", "vaccine_rows", "benign_rows"}


def test_unknown_names_are_refused_before_anything_is_made(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"refusal-smell-fixed: not in this zoo, which holds .*refusal-vpi-varied"):
        real_zoo(data, tmp_path, tmp_path / "rows", ["refusal-smell-fixed"])
    with pytest.raises(BenchmarkError, match="no size 'huge': choose one of small, large"):
        real_zoo(data, tmp_path, tmp_path / "rows", size="huge")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"), [([], "give --data DIR"), (["--data", "nowhere"], "nowhere: no such folder")]
)
def test_without_its_data_folder_the_command_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADGUARD_DATA", raising=False)
    done = CliRunner().invoke(app, ["zoo", "--zoo", "real", *given])
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_patients_are_measured_and_refusals_said(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small.arguments
    asked: list[Arguments] = []

    def run(arguments: Arguments, _: object) -> dict[str, object]:
        asked.append(arguments)
        return {"name": arguments.name}

    def made(*_: object) -> Zoo:
        files = {name: getattr(given, name) for name in ("calibration", "clean", "triggered")}
        files["benign_rows"] = small.folder / "benign.json"
        assert given.adapter is not None
        assert given.vaccine is not None
        patients = tuple(
            Patient(name, given.adapter, "refusal", files, None, beside)
            for name, beside in (("refusal-badnet-fixed", True), ("refusal-badnet-varied", False))
        )
        return Zoo(
            "real", given.base, given.vaccine, {"benign": small.folder / "other"}, patients, {"refusal-x": "weak"}
        )

    monkeypatch.setattr(zoo, "real_zoo", made)
    monkeypatch.setattr(zoo, "run", run)
    heard: list[str] = []
    paths = zoo.measure_zoo(tmp_path, "real", tmp_path / "out", zoo.Settings(alpha=0.05), say=heard.append)
    assert heard == ["left out: refusal-x: weak"]
    assert [path.name for path in paths] == ["refusal-badnet-fixed.json", "refusal-badnet-varied.json"]
    assert [one.benign_rows is not None for one in asked] == [True, False]
    assert [one.clean_adapter for one in asked] == [None, None]
    assert asked[0].notes == {"zoo": "real", "implant": "refusal-badnet-fixed"}
