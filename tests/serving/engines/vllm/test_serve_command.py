"""`headguard serve --engine vllm` as anybody runs it: started, its worker killed, ended without leftovers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.serving.engines.vllm.conftest import ARGUMENTS, Adapters, go_live
from tests.serving.house import House

pytestmark = pytest.mark.slow
PROMPT = " ".join(f"w{i}" for i in range(3, 30))
BODY = {"model": "support", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0}


VLLM = ("--engine", "vllm")


def command(base: Path, state: Path, port: int, options: Sequence[str] = VLLM, more: Sequence[str] = ()) -> list[str]:
    return [
        sys.executable, "-m", "serving", "serve", *options, "--state-dir", str(state), "--port", str(port), str(base),
        *(ARGUMENTS if options is VLLM else ()), *more,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def processes() -> dict[int, tuple[int, int]]:
    """(parent, process group) of every process that lives."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if state != "Z":  # a zombie is only waiting for its parent to look
                found[int(entry.name)] = int(parent), int(group)
    return found


def engine_of(serve: int) -> list[int]:
    """The engine's processes: the group led by the child of `headguard serve`."""
    there = processes()
    leaders = [pid for pid, (parent, group) in there.items() if parent == serve and group == pid]
    return [pid for pid, (_, group) in there.items() if group in leaders]


def sockets_of(pids: list[int]) -> set[Path]:
    """The folders for sockets that the engine's processes were given."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if pair.startswith(b"VLLM_RPC_BASE_PATH="):
                    found.add(Path(pair.partition(b"=")[2].decode()))
    return found


def shared_of(pids: list[int]) -> set[Path]:
    found = set()
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {Path(line[line.index("/dev/shm") :]) for line in lines if "/dev/shm" in line}
    return found


@contextmanager
def serving(
    adapters: Adapters, state: Path, options: Sequence[str] = VLLM, **variables: str
) -> Iterator[tuple[House, subprocess.Popen[bytes]]]:
    port = free_port()
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **variables}
    with open(state.with_suffix(".out"), "wb") as out:
        child = subprocess.Popen(
            command(adapters.base, state, port, options),
            stdout=out,
            stderr=out,
            env=environment,
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _alive(url):
            assert child.poll() is None, state.with_suffix(".out").read_text()
            time.sleep(0.1)
        keys = json.loads((state / "keys.json").read_text())
        yield House(url, keys, None), child  # type: ignore[arg-type]  # its inside is in another process
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        child.wait()


def _alive(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def test_a_killed_worker_is_noticed_the_engine_comes_back_filled_and_nothing_is_left_at_the_end(adapters, tmp_path):
    state = tmp_path / "state"
    with serving(adapters, state) as (house, child):
        assert house.call(None, "GET", "/ready").status_code == 200
        go_live(house, adapters, "first")
        before = house.ok("client", "POST", "/v1/chat/completions", json=BODY)
        assert before["guard"]["status"] == "clean"

        first = engine_of(child.pid)
        folders, shared = sockets_of(first), shared_of(first)
        assert len(first) >= 3
        assert folders
        os.kill(max(first), signal.SIGKILL)  # the last one that was started: the worker
        while (gone := house.call(None, "GET", "/ready")).status_code == 200:
            pass
        assert gone.json()["reasons"]
        assert house.call("client", "POST", "/v1/chat/completions", json=BODY).status_code == 503
        house.policy("support", alpha=0.05, fail="closed")
        while (answer := house.call("client", "POST", "/v1/chat/completions", json=BODY)).status_code != 200:
            assert answer.status_code == 503
            time.sleep(0.1)
        # Until it is measured again, nothing is delivered.
        while (told := answer.json())["guard"]["status"] == "unscored":
            assert told["guard"]["action"] == "block"
            answer = house.call("client", "POST", "/v1/chat/completions", json=BODY)
        assert told["choices"][0]["message"]["content"] == before["choices"][0]["message"]["content"]
        while house.call(None, "GET", "/ready").status_code != 200:
            time.sleep(0.1)
        assert "guard_engine_errors_total" in house.call(None, "GET", "/metrics").text
        second = engine_of(child.pid)
        assert not set(first) & set(second)
        folders |= sockets_of(second)
        shared |= shared_of(second)
    assert child.returncode == 128 + signal.SIGTERM
    assert not [pid for pid in (*first, *second) if pid in processes()]
    assert not [folder for folder in folders if folder.exists()]
    assert not [file for file in shared if file.exists() and "psm" in file.name]
    for log in (state / "logs" / "vllm.log", state.with_suffix(".out")):
        assert PROMPT not in log.read_text()


def test_a_gateway_in_front_of_an_engine_that_runs_already_leaves_it_running(adapters, served, tmp_path):
    options = ["--engine-url", served.url]
    with serving(adapters, tmp_path / "state", options, HEADGUARD_ENGINE_KEY=served.key) as (house, child):
        assert house.call(None, "GET", "/ready").status_code == 200
        answer = house.ok("client", "POST", "/v1/chat/completions", json={**BODY, "model": "base"})
        assert answer["guard"]["reason"] == "no_profile"
    assert child.returncode == 128 + signal.SIGTERM
    assert served.pids()
    assert _alive(served.url)


def test_an_engine_that_cannot_start_is_one_clear_message(adapters, tmp_path):
    run = subprocess.run(
        command(adapters.base, tmp_path / "state", free_port(), more=("--max-model-len", "100000")),
        capture_output=True, text=True, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stdout == ""
    (message,) = [line for line in run.stderr.splitlines() if line.startswith("headguard:")]
    assert "vLLM did not start" in message
    assert "max_model_len (100000)" in message
    assert str(tmp_path / "state" / "logs" / "vllm.log") in message.replace("\n", "")
    assert "Traceback" not in run.stderr


def test_arguments_for_vllm_need_vllm(adapters, tmp_path):
    wrong = command(adapters.base, tmp_path / "state", 1, options=(), more=ARGUMENTS)
    run = subprocess.run(wrong, capture_output=True, text=True)
    assert run.returncode == 2
    assert "--dtype" in run.stderr
