"""The benchmark's measurements and their JSON: what each part took, the ratios, and what the arithmetic says."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks.kernels.layer import build
from benchmarks.kernels.shape import ANSWER_TOKENS, GOAL, SHAPES, arithmetic
from benchmarks.kernels.timing import bandwidth, in_turn, spread

LONG = (1024, 2048, 4096, 8192, 16384, 32768)
_ROWS = 32
# How often each kernel reads a key: the GPU's once for the softmax statistics and once for the weights.
KERNELS = {"cpu": 1, "gpu": 2}


@dataclass(frozen=True)
class Case:
    """One layer to time: a shape's name, R requests, T keys each, dtype's name."""

    shape: str
    rows: int
    keys: int
    dtype: str


# On a CPU, what fits memory and a minute; on a GPU, what the goal is about.
CPU_CASES = (
    Case("0.2b", 8, 384, "float32"),
    Case("0.2b", 8, 384, "bfloat16"),
    Case("8b", 4, 1024, "bfloat16"),
    Case("8b", 4, 4096, "bfloat16"),
)
GPU_CASES = tuple(Case("8b", _ROWS, keys, "bfloat16") for keys in LONG)


def measure(case: Case, repeats: int, device: str, tick: Callable[[], object]) -> dict:
    """Times one case: attention, probe, projections in turn. Milliseconds are of one layer; the step is all layers."""
    shape = SHAPES[case.shape]
    layer = build(shape, case.rows, case.keys, getattr(torch, case.dtype), device)
    rounds = []
    parts = {"attention": layer.attention, "probe": layer.probe, "linear": layer.linear}
    for times in in_turn(parts, repeats, device != "cpu"):
        rounds.append(times)
        tick()
    ratio = [each["probe"] / each["attention"] for each in rounds]
    of_step = [each["probe"] / (each["attention"] + each["linear"]) for each in rounds]
    return {
        "shape": case.shape,
        "rows": case.rows,
        "keys": case.keys,
        "dtype": case.dtype,
        "attention_kernel": layer.attention_kernel,
        **{f"{name}_ms": spread([each[name] for each in rounds]) for name in parts},
        "probe_over_attention": spread(ratio),
        "probe_over_step": spread(of_step),
        "step_ms": shape.layers * median(each["attention"] + each["linear"] for each in rounds),
        "probe_step_ms": shape.layers * median(each["probe"] for each in rounds),
        "goal_met": median(of_step) <= GOAL,
    }


def report(cases: tuple[Case, ...], repeats: int, device: str, mebibytes: int, tick: Callable[[], object]) -> dict:
    """Everything `python -m benchmarks.kernels` writes."""
    gpu = device != "cpu"
    read = bandwidth(device, mebibytes)
    measured = [measure(case, repeats, device, tick) for case in cases]
    speed = float(read["median"]) * 1e9
    sums = [
        {"kernel": kernel} | arithmetic(SHAPES["8b"], _ROWS, keys, passes, speed)
        for kernel, passes in KERNELS.items()
        for keys in LONG
    ]
    return {
        "benchmark": "kernels",
        "gpu": gpu,
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": _version("vllm"),
        "goal": GOAL,
        "bandwidth_gb_per_s": read,
        "measured": measured,
        "arithmetic": sums,
        "in_words": _sentences(gpu, sums, measured),
    }


def _processor() -> str:
    """The processor's name as Linux has it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sentences(gpu: bool, sums: list[dict], measured: list[dict]) -> list[str]:
    where = "Measured on a GPU." if gpu else "No GPU on this machine: times are of the CPU kernel on the CPU."
    said = [where]
    for each in measured:
        said.append(
            f"{each['shape']} {each['dtype']}, {each['rows']} requests of {each['keys']} keys: probe / attention "
            f"{each['probe_over_attention']['median']:.2f}, probe / decode step "
            f"{each['probe_over_step']['median']:.1%}, {_met(each)}."
        )
    for each in sums:
        said.append(
            f"By bytes moved, {each['kernel']} kernel, 8b in 16 bits, {each['rows']} requests of {each['keys']} keys, "
            f"watched on every token: {each['share_of_step']:.1%} of a step, {each['keys_share_of_probe']:.1%} of that "
            f"reading keys again ({each['share_without_reading_keys_again']:.2%} if the decode kernel shared them), "
            f"{_met(each)}; window 16 {each['share_by_window']['16']:.2%}, prefill "
            f"{each['share_by_window']['prefill']:.2%} of the steps of a {ANSWER_TOKENS}-token answer."
        )
    return said


def _met(each: dict) -> str:
    return f"goal of {GOAL:.0%} for every token {'met' if each['goal_met'] else 'not met'}"
