from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.detection.benchmark import save
from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.paper import TABLE_1
from benchmarks.detection.report import read_results, render, summary, write_report
from benchmarks.detection.sentences import failures


def named(result: dict[str, Any], name: str, **notes: str) -> dict[str, Any]:
    made = copy.deepcopy(result)
    return made | {"name": name, "notes": notes}


def test_a_report_holds_a_row_per_implant_the_papers_table_and_the_plots(
    result: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        save(named(result, name), tmp_path / f"{name}.json")
    out = tmp_path / "docs" / "detection.md"
    write_report(read_results([tmp_path]), out, "What was explored first.")
    text = out.read_text()
    for table in ("Power", "promise", "Ablation", "Table 1", "Controls", "Localisation", "Inputs"):
        assert any(line.startswith("## ") and table in line for line in text.splitlines())
    assert text.count("| `one` |") >= 5
    assert "What was explored first." in text
    for values in TABLE_1.values():
        assert f"| {values['clean']:.4f} | {values['triggered']:.4f} |" in text
    for image in ("detection-roc.png", "detection-figure-1.png"):
        assert f"({image})" in text
        assert (out.parent / image).read_bytes().startswith(b"\x89PNG")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| `one` | `fused`")}
    assert len(widths) == 1


def test_a_control_that_fails_is_told_in_words(result: dict[str, Any]) -> None:
    broken = named(result, "broken")
    for control in broken["controls"].values():
        control["fails"] = False
    broken["others"] = {}
    for promise in broken["uniformity"].values():
        promise["inside_held_out"] = True
    assert failures(broken) == []
    assert "None fails." in render([broken], "x")
    broken["controls"]["forced"] |= {"fails": True}
    assert "the text that follows, not the trigger" in failures(broken)[0]
    broken["uniformity"]["fused"]["inside_held_out"] = False
    assert "not exchangeable" in failures(broken)[1]
    text = render([broken], "x")
    share = broken["controls"]["forced"]
    assert f"**{share['fused']['value']:.3f} ({share['fused_attention_only']['value']:.3f})" in text
    assert failures(broken)[0] in text
    assert failures(broken)[0] in summary(broken)


def test_runs_without_a_family_stand_in_a_table_of_their_own(result: dict[str, Any]) -> None:
    text = render([named(result, "one"), named(result, "one", left_out="refusal", implant="one")], "x")
    assert "## Leave one family out" in text
    assert "| `one` | refusal |" in text


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(BenchmarkError, match="not a result"):
        read_results([tmp_path / "rows.json"])
    with pytest.raises(BenchmarkError, match="no result in"):
        read_results([tmp_path])
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read_results([tmp_path / "missing.json"])
