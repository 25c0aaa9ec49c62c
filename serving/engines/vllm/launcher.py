"""`vllm serve` as a child process: started and waited for, started again when it dies, stopped with all it made.

The child listens on loopback and asks for a key that only this process knows. Its log is a file in the state folder;
when it does not come up, the log's own errors become one message.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx

from serving.engines.vllm import arguments
from serving.engines.vllm.arguments import EngineNotStarted
from serving.engines.vllm.processes import ProcessGroup

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.25
_LONGEST_BACKOFF_S = 60.0
_MESSAGE_CHARS = 600
# "(EngineCore pid=12) ERROR 11-22 04:40:11 [core.py:93] ValueError: …", or the last line of a plain traceback.
_ERROR = re.compile(r"(?:^|[\s:\]])((?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Guarded|Model|Interrupt)): (.+)$")
_PREFIX = re.compile(r"^\(\w+ pid=\d+\)\s*(?:[A-Z]+ [\d-]+ [\d:]+ \[\S+\])?")
_USAGE = re.compile(r"(?:error|argument): (.+)$")


class VllmServer:
    """A guarded `vllm serve` on a free port of loopback. `start` it, `close` it; both block.

    model: the base's folder; given: the user's arguments for vLLM; log_file: where its output goes.
    """

    def __init__(self, model: Path, served_name: str, given: Sequence[str], log_file: Path) -> None:
        self._cpu = "cpu" in arguments.installed()
        self.log_file, self.key = log_file, secrets.token_urlsafe(24)
        self.port = _free_port()
        command = partial(arguments.command, model, served_name, self.port, given, self._cpu)
        command()  # what is refused is refused before anything is made
        self._folder = Path(tempfile.mkdtemp(prefix="headguard-"))
        self._command = command(arguments.chat_template(model, self._folder))
        self._closing = threading.Event()
        self._ready = threading.Event()
        self._failure: EngineNotStarted | None = None
        self._group: ProcessGroup | None = None
        self.starts = 0
        self._keeper = threading.Thread(target=self._keep, name="headguard-vllm", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        """Its living processes."""
        return self._group.members() if self._group is not None else []

    def start(self, tick: Callable[[], None] = lambda: None) -> None:
        """Starts it and waits until it serves, guarded, calling `tick` meanwhile. Raises EngineNotStarted; then nothing
        is left of it.
        """
        self._keeper.start()
        try:
            while not self._ready.wait(_LOOK_EVERY_S):
                tick()
                if self._failure is not None:
                    raise self._failure
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops it, with every process, socket and piece of shared memory that it made."""
        self._closing.set()
        if self._keeper.is_alive():
            self._keeper.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    # In the keeper's thread: a child ends with the thread that started it --------------------------------------------

    def _keep(self) -> None:
        backoff_s = 1.0
        while not self._closing.is_set():
            try:
                group = self._group = self._run()
            except OSError as error:
                self._failure = EngineNotStarted(f"vLLM could not be started: {error}.")
                return
            try:
                if self._comes_up(group):
                    self._ready.set()
                    backoff_s = 1.0
                    while group.running and not self._closing.wait(_LOOK_EVERY_S):
                        pass
            finally:
                group.end()
            if self._closing.is_set() or self._failure is not None:
                return
            log.error("vLLM ended by itself, it is started again: %s", _last_words(self.log_file))
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def _run(self) -> ProcessGroup:
        self.starts += 1
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        environment = arguments.environment(arguments.around(), self.key, self._folder, self._cpu)
        return ProcessGroup(self._command, environment, self.log_file)

    def _comes_up(self, group: ProcessGroup) -> bool:
        """Waits until it serves. A first start that fails is told to whoever waits for it."""
        headers = {"authorization": f"Bearer {self.key}"}
        with httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30.0) as client:
            while not self._closing.wait(_LOOK_EVERY_S):
                if not group.running:
                    self._fail(f"vLLM did not start: {_last_words(self.log_file)}")
                    return False
                try:
                    status = client.get("/guard/status").status_code
                except httpx.HTTPError:
                    continue
                if status == 200:
                    group.note_shared()
                    return True
                self._fail(f"vLLM started without the guard (/guard/status answers {status}). Log: {self.log_file}")
                return False
        return False

    def _fail(self, message: str) -> None:
        if not self._ready.is_set():
            self._failure = EngineNotStarted(message)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _last_words(log_file: Path) -> str:
    """Why vLLM ended, from its log: the first error it named (the cause), else its last line."""
    try:
        lines = log_file.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = [
        f"{match[1].rpartition('.')[2]}: {match[2]}{_continued(match[2], lines[place + 1 : place + 3])}"
        for place, line in enumerate(lines)
        if (match := _ERROR.search(line.rstrip()))
    ]
    usage = [match[1] for line in lines if "usage" not in line and (match := _USAGE.search(line.rstrip()))]
    words = (named or usage or [line for line in lines if line.strip()][-1:] or ["it said nothing"])[0]
    return f"{words[:_MESSAGE_CHARS]} (log: {log_file})"


def _continued(message: str, following: Sequence[str]) -> str:
    """What pydantic says on the next lines, of which the first is only a count."""
    if "validation error" not in message:
        return ""
    return ": " + " ".join(_PREFIX.sub("", line).strip() for line in following).split(" [type=")[0]
