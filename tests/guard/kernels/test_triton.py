"""The GPU kernel: interpreted on the CPU, compiled for GPUs that need not be there, and run on one that is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def run(module: str, *arguments: str, **environment: str) -> None:
    """Runs a module of this package in its own process; fails with what it said if it fails."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", f"tests.guard.kernels.{module}", *arguments]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_interpreted_programs_give_the_reference_for_every_kind_of_batch():
    pytest.importorskip("triton")
    run("gpu_check", "cases", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_the_programs_compile_for_gpus_and_fit_their_shared_memory(tmp_path):
    pytest.importorskip("triton")
    run("gpu_compile", TRITON_CACHE_DIR=str(tmp_path))


@gpu
def test_compiled_programs_give_the_reference_for_every_kind_of_batch():
    run("gpu_check", "cases")


@gpu
def test_a_captured_graph_observes_the_rows_its_buffers_hold_at_replay():
    run("gpu_check", "graph")


def test_without_triton_the_module_imports_and_says_what_is_missing():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from guard.errors import KernelError\n"
        "from guard.kernels import triton\n"
        "try: triton.Workspace(1, 1, 'cpu')\n"
        "except KernelError as error: assert 'triton package' in str(error), error\n"
        "else: raise SystemExit('no refusal')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
