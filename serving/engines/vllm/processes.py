"""A child process with everything that it starts: one process group, ended without leftovers.

vLLM is several processes that talk through shared memory. Asked nicely they clean up; killed, they leave files in
/dev/shm. So what they have mapped is noted while they live, and what is still there when they are gone is removed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_SHARED = "/dev/shm/"
_PR_SET_PDEATHSIG = 1
_GRACE_S = 20.0


def _end_with_parent() -> None:
    """In the child: SIGTERM when the thread that started it is gone, so that a killed gateway leaves no engine."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ProcessGroup:
    """A command running in a process group of its own, its output in a file that only its owner can read.

    It stays in its parent's session. Linux shares the cores between sessions before it shares them between processes,
    and vLLM yields in a loop while it waits: in a session of its own it kept its gateway off a busy core for seconds.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
            self._leader = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                process_group=0, preexec_fn=_end_with_parent,
            )  # fmt: skip
        self.pid = self._leader.pid
        self._shared: set[str] = set()

    @property
    def running(self) -> bool:
        """Whether the process that was started still runs."""
        return self._leader.poll() is None

    def members(self) -> list[int]:
        """The living processes of the group."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError, IndexError):
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z":
                    found.append(int(entry.name))
        return found

    def note_shared(self) -> None:
        """Remember which shared memory the group has mapped."""
        for pid in self.members():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    path = line[line.find("/") :] if "/" in line else ""
                    if path.startswith(_SHARED):
                        self._shared.add(path.removesuffix(" (deleted)"))

    def end(self, grace_s: float = _GRACE_S) -> None:
        """Asks the group to end, makes it end, and removes what it left in shared memory."""
        self.note_shared()
        if self.running:
            self._leader.terminate()
        give_up = time.monotonic() + grace_s
        while self.members() and time.monotonic() < give_up:
            self._leader.poll()
            time.sleep(0.05)
        while self.members():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._leader.poll()
            time.sleep(0.02)
        self._leader.wait()
        for path in self._shared:
            Path(path).unlink(missing_ok=True)
