"""The real server as a child process: `headguard serve` on a free loopback port, stopped at the end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


class ServerError(Exception):
    """The server did not come up; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """Where a running server is, and the keys of the people who use it."""

    url: str
    client: str
    operator: str
    approver: str
    state_dir: Path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    base: Path, state_dir: Path, clean: Path, vaccine: Path | None = None, name: str = "base", start_s: float = 120.0
) -> Iterator[Server]:
    """Start `headguard serve` with its repair worker and wait until it answers. Raises ServerError."""
    state_dir.mkdir(parents=True, exist_ok=True)
    port, log = _free_port(), state_dir / "server.log"
    command = [
        sys.executable, "-m", "serving", "serve", str(base), "--served-name", name, "--state-dir", str(state_dir),
        "--port", str(port), "--clean", str(clean), *(["--vaccine", str(vaccine)] if vaccine else []),
    ]  # fmt: skip
    environment = {n: v for n, v in os.environ.items() if not n.startswith("HEADGUARD_")}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log, start_s)
        keys = json.loads((state_dir / "keys.json").read_text())
        yield Server(url, keys["client"], keys["operator"], keys["approver"], state_dir)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server stopped while starting (exit code {process.returncode}):\n{_tail(log)}")
        try:
            if httpx.get(f"{url}/health", timeout=2.0).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise ServerError(f"the server did not answer within {start_s:g} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
