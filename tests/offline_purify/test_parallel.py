"""Trainings side by side, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offline_purify.parallel import side_by_side

FAMILY = """
import os, sys, time
from pathlib import Path
from offline_purify.parallel import side_by_side
def stay(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
if __name__ == "__main__":
    side_by_side(stay, [(sys.argv[1],)] * 2, jobs=2)
"""


def test_results_come_in_order_whoever_finishes_first():
    seen = []
    assert side_by_side(pow, [(2, 3), (3, 2), (5, 1)], 2, lambda *told: seen.append(told), "powers") == [8, 9, 5]
    assert seen == [("powers", 1, 3), ("powers", 2, 3), ("powers", 3, 3)]


def test_an_error_of_one_is_raised():
    with pytest.raises(ZeroDivisionError):
        side_by_side(divmod, [(1, 0), (4, 2)], 1)


def runs(pid: str) -> bool:
    try:
        return (Path("/proc") / pid / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    script, told = tmp_path / "family.py", tmp_path / "pids"
    script.write_text(FAMILY)
    told.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(told)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    try:
        while len(list(told.iterdir())) < 2:
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    give_up = time.monotonic() + 30
    while any(runs(path.name) for path in told.iterdir()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
