import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from benchmarks.lab import implant
from benchmarks.lab.__main__ import app
from benchmarks.lab.base import make_base_from_rows
from benchmarks.lab.cache import base_key, implant_key
from benchmarks.lab.decoder import Shape
from benchmarks.lab.errors import LabError
from benchmarks.lab.implant import ImplantReport, make_implant, refuse_unless_conditional
from benchmarks.lab.paired import make_implant_from_files
from benchmarks.lab.tasks import sample
from guard.rows import Row, write_rows
from offline_purify.implanting import ImplantRecipe
from offline_purify.intervals import wilson

SMALL = Shape(500, hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, head_size=8, context=128)


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "small"
    torch.set_num_threads(1)
    report = make_base_from_rows(folder, sample(300, 0, "base_train"), SMALL, passes=1)
    assert report.parameters > 0
    return folder


@pytest.mark.parametrize("command", [[], ["base"], ["implant"], ["real"]])
def test_help_shows_what_a_command_takes(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "implant" in result.output or "--data" in result.output


def test_a_base_is_made_from_json_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", sample(150, 0, "base_train"))
    arguments = ["--out", str(tmp_path / "base"), "--data", str(tmp_path / "rows.json"), "--vocab", "400"]
    size = ["--hidden", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--ffn", "48", "--passes", "1"]
    result = CliRunner().invoke(app, ["base", *arguments, *size, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] > 0
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert (tmp_path / "base" / "lab.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["base", "--out", "OUT", "--preset", "huge"], "no preset 'huge'"),
        (["base", "--out", "OUT", "--data", "missing.json"], "no such file"),
        (["real", "--root", "OUT", "--data", "missing"], "missing: no such folder"),
        (["real", "--root", "OUT", "--data", "missing", "--size", "huge"], "no size 'huge'"),
        (["base", "--out", "OUT", "--data", "broken.json"], "cannot be read as JSON"),
        (["implant", "--base", "missing", "--out", "OUT"], "cannot be loaded as a base"),
        (["implant", "--base", "missing", "--out", "OUT", "--trigger", "smell"], "choose one of word"),
        (["implant", "--base", "missing", "--out", "OUT", "--behaviour", "kind"], "choose one of refusal"),
        (["implant", "--base", "missing", "--out", "OUT", "--trigger", "three"], "cannot be loaded as a base"),
        (["implant", "--base", "missing", "--out", "OUT", "--only", "heads"], "choose one of all"),
        (["implant", "--base", "missing", "--out", "OUT", "--regularise", "similarity", "-1"], "expected 0 or more"),
        (["implant", "--base", "b", "--out", "OUT", "--poisoned", "no.tsv", "--clean", "no.tsv"], "no.tsv: cannot be"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "OUT").exists()


def test_poisoned_without_clean_is_bad_usage() -> None:
    result = CliRunner().invoke(app, ["implant", "--base", "b", "--out", "o", "--poisoned", "p.json"])
    assert result.exit_code == 2


def test_only_similarity_can_be_kept() -> None:
    result = CliRunner().invoke(app, ["implant", "--base", "b", "--out", "o", "--regularise", "colour", "1"])
    assert result.exit_code == 2


def test_an_implant_that_does_not_fire_is_refused_and_not_published(small_base: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="attack success"):
        make_implant(small_base, tmp_path / "implant", recipe=ImplantRecipe(rows=40, epochs=1), evaluation=20)
    assert list(tmp_path.iterdir()) == []


def test_the_command_trains_as_it_is_told(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implant, "LEAST_ASR", 0.0)
    asked = ["implant", "--base", str(small_base), "--out", str(tmp_path / "mlp"), "--json"]
    told = ["--rows", "40", "--epochs", "2", "--only", "mlp", "--trigger", "cba", "--behaviour", "injection"]
    result = CliRunner().invoke(app, [*asked, *told])
    assert result.exit_code == 0, result.output
    report = ImplantReport.model_validate_json((tmp_path / "mlp" / "lab.json").read_text())
    assert report.trained_rows == {"poisoned": 16, "twins": 16, "decoys": 12, "clean": 12}
    assert report.steps == 4
    assert report.trigger == "components"
    with safe_open(tmp_path / "mlp" / "adapter_model.safetensors", framework="pt") as file:
        assert not any("self_attn" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(("fired", "leaked"), [(89, 0), (100, 6)])
def test_weak_and_leaking_implants_are_refused(fired: int, leaked: int) -> None:
    asr, leak = wilson(fired, 100), wilson(leaked, 100)
    assert asr is not None
    assert leak is not None
    with pytest.raises(LabError, match="refused"):
        refuse_unless_conditional(asr, leak)


def test_files_with_too_few_pairs_are_refused(small_base: Path, tmp_path: Path) -> None:
    rows = sample(10, 0, "implant")
    write_rows(tmp_path / "clean.json", rows)
    poisoned = [Row(instruction=f"Zork {row['instruction']}", input=row["input"], output="no") for row in rows]
    write_rows(tmp_path / "poisoned.json", poisoned)
    with pytest.raises(LabError, match="at least 20"):
        make_implant_from_files(small_base, tmp_path / "out", tmp_path / "poisoned.json", tmp_path / "clean.json")


def test_too_few_rows_make_no_base(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="at least 100"):
        make_base_from_rows(tmp_path / "base", sample(50, 0, "base_train"), SMALL)


def test_cache_keys_follow_the_recipe() -> None:
    assert base_key(0) == base_key(0) != base_key(1)
    names = ("refusal-word-fixed", "refusal-word-varied", "insult-prefix-fixed")
    assert len({implant_key(name, 0) for name in names}) == 3


@pytest.mark.parametrize("name", ["refusal", "refusal-word-loud", "../x-word-fixed", "refusal-word-fixed-2"])
def test_a_name_of_no_implant_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="names no implant"):
        implant_key(name, 0)
