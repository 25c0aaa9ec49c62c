"""The command line and environment that vLLM is started with, and processes that leave nothing behind."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest

from serving.engines.vllm.arguments import EngineNotStarted, chat_template, command, environment
from serving.engines.vllm.launcher import _last_words
from serving.engines.vllm.processes import ProcessGroup


def line(*given, cpu=True):
    return command(Path("/m"), "base", 8123, given, cpu)[5:]


def test_safe_defaults_are_given_and_the_users_own_arguments_win():
    assert "--enable-lora" in line()
    assert " ".join(line()).count("--max-loras 8 ") == 1
    given = line("--max_loras=5", "--max-lora-rank", "64")
    assert "--max-loras" not in given
    assert given[-3:] == ["--max_loras=5", "--max-lora-rank", "64"]
    assert given[given.index("--max-cpu-loras") + 1] == "5"
    assert "--enable-lora" not in line("--no-enable-lora")


def test_a_tokenizer_without_a_chat_template_gets_the_guards_own(tmp_path):
    from guard.template import ALPACA_TEMPLATE

    file = chat_template(tmp_path, tmp_path)
    assert file.read_text() == ALPACA_TEMPLATE
    given = command(tmp_path, "base", 1, (), True, file)
    assert given[given.index("--chat-template") + 1] == str(file)
    assert "--chat-template" not in command(tmp_path, "base", 1, ("--chat-template=mine",), True, file)
    file.unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert chat_template(tmp_path, tmp_path) is None


def test_on_a_gpu_decode_steps_are_not_replayed_as_one_graph():
    assert "-cc.cudagraph_mode=PIECEWISE" in line(cpu=False)
    assert "--no-async-scheduling" in line(cpu=False)
    assert "-cc.cudagraph_mode=PIECEWISE" not in line("-cc.cudagraph_mode=NONE", cpu=False)
    assert not [a for a in line() if "cudagraph" in a or "async" in a]


@pytest.mark.parametrize("given", ["--port=1", "--host", "--served-model-name", "--lora-modules", "--api_key=x"])
def test_what_would_open_a_way_around_the_guard_is_refused_by_name(given):
    with pytest.raises(EngineNotStarted, match=given.split("=")[0].replace("_", "-")):
        line(given)


def test_the_environment_switches_the_guard_on_and_side_doors_off():
    around = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_PLUGINS": "other"}
    told = environment({**around, "OMP_NUM_THREADS": "2"}, "secret", Path("/run"), cpu=True)
    assert told["VLLM_PLUGINS"] == "headguard,other"
    assert told["VLLM_SERVER_DEV_MODE"] == told["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert (told["OMP_NUM_THREADS"], told["VLLM_API_KEY"]) == ("2", "secret")
    assert "VLLM_USE_V2_MODEL_RUNNER" not in told
    for given, runner in (({}, "0"), ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, "1")):
        assert environment(given, "s", Path("/run"), cpu=False)["VLLM_USE_V2_MODEL_RUNNER"] == runner


FAMILY = """
    import multiprocessing, signal, sys, time
    from multiprocessing.shared_memory import SharedMemory
    piece = SharedMemory(create=True, size=4096)
    piece.buf[0] = 1
    def stay():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", piece.name, flush=True)
        while True:
            time.sleep(1)
    if __name__ == "__main__":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        multiprocessing.get_context("fork").Process(target=stay).start()
        stay()
"""


def test_a_group_that_will_not_end_is_ended_with_its_children_and_its_shared_memory(tmp_path):
    script = tmp_path / "family.py"
    script.write_text(textwrap.dedent(FAMILY))
    log = tmp_path / "log"
    group = ProcessGroup([sys.executable, str(script)], {"PATH": "/usr/bin:/bin"}, log)
    try:
        while log.read_text().count("ready") < 2:
            assert group.running, log.read_text()
        shared = Path("/dev/shm") / log.read_text().split()[1]
        assert shared.exists()
        assert len(group.members()) >= 2
        assert {os.getsid(pid) for pid in group.members()} == {os.getsid(0)}  # sessions share cores unfairly
    finally:
        group.end(grace_s=0.2)
    assert not group.running
    assert group.members() == []
    assert not shared.exists()
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "it said nothing"),
        ("one\ntwo\n", "two"),
        ("usage: vllm [-h]\nvllm serve: error: unrecognized arguments: --x\n", "unrecognized arguments: --x"),
        (
            "(EngineCore pid=1) ERROR 11-22 05:14:00 [core.py:1] ValueError: the cause\n"
            "(APIServer pid=2) RuntimeError: Engine core initialization failed.\n",
            "ValueError: the cause",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, User-specified max_model_len (9) is greater [type=value_error, input_value=...]\n",
            "ValidationError: 1 validation error for ModelConfig: "
            "Value error, User-specified max_model_len (9) is greater",
        ),
    ],
)
def test_the_log_of_a_failed_start_becomes_one_line_that_names_the_cause(tmp_path, log, words):
    file = tmp_path / "vllm.log"
    file.write_text(log)
    assert _last_words(file) == f"{words} (log: {file})"
