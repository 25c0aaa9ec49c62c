"""The kernel benchmark's command and its JSON, at sizes that say nothing about speed."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.kernels.__main__ import app
from benchmarks.kernels.shape import SHAPES, arithmetic


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    pytest.importorskip("numba")
    out = tmp_path_factory.mktemp("kernels") / "kernels.json"
    arguments = ["--shape", "tiny", "--rows", "2", "--keys", "40", "--dtype", "float32", "--repeats", "3"]
    done = CliRunner().invoke(app, [*arguments, "--mebibytes", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())


def test_each_part_has_a_median_a_spread_and_a_count(result):
    (case,) = result["measured"]
    for part in ("attention_ms", "probe_ms", "linear_ms", "probe_over_attention", "probe_over_step"):
        assert case[part]["n"] == 3
        assert 0 < case[part]["p10"] <= case[part]["median"] <= case[part]["p90"]
    assert result["bandwidth_gb_per_s"]["median"] > 0


def test_a_run_without_gpu_says_so(result):
    if result["gpu"]:
        assert "GPU" in result["in_words"][0]
    else:
        assert "No GPU" in result["in_words"][0]
        assert result["device"]


def test_the_arithmetic_covers_the_lengths_of_the_goal_and_says_whether_it_is_met(result):
    for kernel in ("cpu", "gpu"):
        lengths = [each["keys"] for each in result["arithmetic"] if each["kernel"] == kernel]
        assert lengths == [1024, 2048, 4096, 8192, 16384, 32768]
    for each in result["arithmetic"]:
        assert each["goal_met"] == (each["share_of_step"] <= result["goal"])
        assert each["share_by_window"]["prefill"] < each["share_by_window"]["16"] < each["share_by_window"]["all"]


def test_an_8b_shape_has_eight_billion_weights_and_keys_are_half_of_what_attention_reads():
    shape = SHAPES["8b"]
    assert 7.4e9 < shape.weights < 8.1e9  # the input embedding is not read as a whole
    sums = arithmetic(shape, 32, 1024, 1, 1e9)
    assert sums["probe_key_bytes"] * 2 == sums["step_kv_bytes"] == 32 * 1024 * 32 * 8 * 128 * 2 * 2


@pytest.mark.parametrize("flags", [["--shape", "9b"], ["--dtype", "int4"]])
def test_bad_usage_is_refused_by_name(flags, tmp_path):
    done = CliRunner().invoke(app, [*flags, "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 2
    assert flags[1] in done.output
