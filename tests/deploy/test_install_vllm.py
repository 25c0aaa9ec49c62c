"""What the installer of vLLM's CPU build asks pip for, and the distribution that it writes."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from deploy.install_vllm import VERSION, needed, write_distribution


def test_everything_but_torch_and_extras_is_asked_for_with_its_markers():
    asked = needed([
        "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchvision; platform_machine != 'riscv64'", "torchaudio",
        "torchcodec>=0.14", "torch-like>=1", "msgspec", "six>=1.16.0; python_version > '3.11'",
        "pandas; extra == 'bench'",
    ])  # fmt: skip
    assert asked == ["torch-like>=1", "msgspec", "six>=1.16.0; python_version > '3.11'"]


def test_the_distribution_that_vllm_looks_for_is_found_and_can_be_removed_again(tmp_path):
    write_distribution(tmp_path)
    write_distribution(tmp_path)
    found = importlib.metadata.Distribution.at(tmp_path / f"vllm-{VERSION}+cpu.dist-info")
    assert (found.metadata["Name"], found.version) == ("vllm", f"{VERSION}+cpu")
    assert sorted(file.name for file in found.files) == ["INSTALLER", "METADATA", "RECORD"]
    assert all(file.hash is None or (tmp_path / file).stat().st_size == file.size for file in found.files)


def test_what_is_installed_already_is_not_installed_again():
    run = subprocess.run([sys.executable, "deploy/install_vllm.py", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "--cpu" in run.stdout
