"""The README is checked against the program: every command it shows exists, with every option it shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [re.sub(r"^[A-Z_]+=\S+ ", "", line) for line in LINES if "headguard " in line]


def run_help(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving", *words, "--help"], capture_output=True, text=True, cwd=ROOT,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shown_in_the_readme_exists_with_its_options(command):
    words = command.split()[1:]
    names = [word for word in words[:2] if word.islower() and not word.startswith("-") and "/" not in word]
    shown = run_help(names)
    if shown.returncode == 2:  # the second word was an argument, not a command
        shown = run_help(names[:1])
    assert shown.returncode == 0, shown.stderr
    for option in re.findall(r"--[a-z-]+", command):
        assert option in shown.stdout, f"{option} is not an option of {' '.join(names)}"
    assert "Example:" in shown.stdout


def test_make_targets_shown_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= targets


def test_rooms_of_the_readme_exist():
    for room in re.findall(r"^\| `([a-z_]+)/` \|", README, flags=re.MULTILINE):
        assert (ROOT / room).is_dir(), room
