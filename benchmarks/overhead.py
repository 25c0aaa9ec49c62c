"""What the guard costs a serving engine: guard off, attached but idle, and watching, interleaved in one run.

Two engines of the same model stand side by side: vLLM as it comes, and vLLM with the plugin. Every repetition runs the
same batch through each arm, the order turned round from one repetition to the next, so that whatever else the machine
does falls on all of them; what is reported is the median of the ratios within repetitions, with its bootstrap interval.

    off     stock vLLM                       idle    plugin attached, nobody watched
    watched every request read up to the window, its verdict computed with a real profile
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from guard.calibration import fit_profile
from guard.probes.vllm.measure import OfflineEngine
from guard.probes.vllm.probe import FIELD
from guard.probes.vllm.support import ENGINE
from guard.profile import NO_ADAPTER, ProfileKey
from guard.readings import Measurement, Readings, checkpoints_within
from guard.verdict import Window
from offline_purify.intervals import bootstrap
from offline_purify.progress import ProgressBar

DRAWN, COPIES = 16, 8
"""Prompts measured for the watched arm's profile, and slightly changed copies of each that it is fitted on: what the
profile says does not matter here, what it costs does."""


class Engine(StrEnum):
    """Engines that can be measured."""

    vllm = "vllm"


@dataclass(frozen=True)
class Model:
    """A Llama shape: layers, hidden and feed-forward width, query and key/value heads of size `head`, vocabulary."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


SHAPES = {
    "tiny": Model(4, 256, 688, 8, 4, 32, 4000),
    "0.2b": Model(16, 1024, 2816, 16, 8, 64, 32_000),
}

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: python -m benchmarks.overhead --engine vllm --shape 0.2b --batch 8 --window 16 --out overhead.json"
)
def main(
    out: Annotated[Path, typer.Option(help="Where to write the figures (JSON).")],
    engine: Annotated[Engine, typer.Option(help="Engine to measure.")] = Engine.vllm,
    shape: Annotated[str, typer.Option(help=f"Random-weight Llama shape: {' or '.join(SHAPES)}.")] = "tiny",
    batch: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.", min=8)] = 256,
    new: Annotated[int, typer.Option(help="New tokens per request.", min=2)] = 128,
    window: Annotated[str, typer.Option(help="What is watched: prefill, a number of tokens, or all.")] = "prefill",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Repetitions of all arms.", min=2)] = 9,
    seed: Annotated[int, typer.Option(help="Prompts and weights follow from it.")] = 0,
) -> None:
    """Throughput lost to the guard, as ratios within one run."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}: expected {' or '.join(SHAPES)}.", param_hint="--shape")
    if window not in ("prefill", "all") and not window.isdigit():
        raise typer.BadParameter("expected prefill, all or a number of tokens.", param_hint="--window")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a stopped run leaves no engine behind
    watched: Window = int(window) if window.isdigit() else window  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, ProgressBar() as bar:
        base = Path(folder) / "base"
        _save_model(base, SHAPES[shape], prompt + new, seed)
        told = _measure(base, Path(folder), watched, batch, prompt, new, dtype, repeats, seed, bar)
    told = {
        "engine": engine.value, "shape": shape, "parameters": told.pop("parameters"), "dtype": dtype, "batch": batch,
        "prompt_tokens": prompt, "new_tokens": new, "window": watched, "repeats": repeats, "seed": seed,
        "device": "cuda" if torch.cuda.is_available() else "cpu", **told,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    loss, idle = told["throughput_loss"], told["idle_loss"]
    typer.echo(
        f"{out}: window {window} costs {loss['value']:.2%} of throughput [{loss['low']:.2%}, {loss['high']:.2%}], "
        f"attached and idle {idle['value']:.2%} [{idle['low']:.2%}, {idle['high']:.2%}] (n = {repeats})."
    )


def _save_model(folder: Path, shape: Model, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head, max_position_embeddings=max(512, tokens), tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _measure(
    base: Path, folder: Path, window: Window, batch: int, prompt: int, new: int, dtype: str, repeats: int, seed: int,
    bar: ProgressBar,
) -> dict[str, Any]:  # fmt: skip
    rng = random.Random(seed)
    vocabulary = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    options: dict[str, Any] = {
        "skip_tokenizer_init": True, "max_model_len": prompt + new, "max_num_seqs": batch, "seed": seed,
        "enable_prefix_caching": False, "max_num_batched_tokens": max(2048, prompt + new),
    }  # fmt: skip

    def prompts(n: int) -> list[list[int]]:
        return [[rng.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(n)]

    stock = OfflineEngine(base, dtype, guarded=False, **options)
    try:
        guarded = OfflineEngine(base, dtype, **options)
        try:
            last = new if window == "all" else 1 if window == "prefill" else int(window) + 1
            steps = checkpoints_within(last)
            bar("calibration", 0, 1)
            clean = _copied(guarded.measure(prompts(DRAWN), steps, last), seed)
            status = guarded.status()
            key = ProfileKey("0" * 64, NO_ADAPTER, ENGINE, status["dtype"], status["key"])
            profile = fit_profile(clean, key, seed=seed)
            profile.save(folder / "profile.safetensors")
            seconds = _interleaved(stock, guarded, folder / "profile.safetensors", profile.smallest_alpha(window),
                                   window, prompts, batch, new, repeats, bar)  # fmt: skip
            status = guarded.status()
        finally:
            guarded.close()
    finally:
        stock.close()
    tokens = batch * new
    return {
        "parameters": int(_parameters(base)),
        "throughput_loss": _loss(seconds["off"], seconds["watched"]),
        "idle_loss": _loss(seconds["off"], seconds["idle"]),
        "tokens_per_second": {arm: tokens / statistics.median(took) for arm, took in seconds.items()},
        "seconds": seconds,
        "rows_watched": status["planned_rows"],
        "rows_seen": status["seen_rows"],
        "checkpoints": list(profile.within(window)),
    }


def _copied(drawn: Measurement, seed: int) -> Measurement:
    """COPIES of every request, Grams scaled by a few per cent."""
    rng = torch.Generator().manual_seed(seed)
    at = {}
    for step, readings in drawn.at.items():
        n = len(readings.index)
        gram = readings.gram.repeat(COPIES, 1, 1, 1)
        noise = 1 + 0.03 * torch.randn(gram.shape, generator=rng)
        at[step] = Readings(
            step,
            np.concatenate([readings.index + copy * len(drawn) for copy in range(COPIES)]),
            gram * (noise + noise.mT) / 2,
            readings.sink.repeat(COPIES, 1, 1) * (1 + 0.03 * torch.randn(COPIES * n, 1, 1, generator=rng)),
            np.tile(readings.logprobs, (COPIES, 1)),
            [focus for _ in range(COPIES) for focus in readings.focus],
        )
    return Measurement(np.tile(drawn.prompt_len, COPIES), [a for _ in range(COPIES) for a in drawn.answers], at)


def _interleaved(
    stock: OfflineEngine, guarded: OfflineEngine, profile: Path, alpha: float, window: Window, prompts: Any,
    batch: int, new: int, repeats: int, bar: ProgressBar,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each arm's runs; the first repetition warms up and is thrown away."""
    from vllm import SamplingParams

    watch = {FIELD: {"window": window, "alpha": alpha, "stop": False, "fail": "open"}}

    def run(engine: OfflineEngine, asked: Sequence[Sequence[int]], extra: dict[str, Any] | None) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=extra)
        began = time.perf_counter()
        engine.llm.generate([{"prompt_token_ids": list(p)} for p in asked], params, use_tqdm=False)
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {"off": [], "idle": [], "watched": []}
    for repeat in range(repeats + 1):
        asked = prompts(batch)
        arms = ["off", "idle", "watched"]
        for arm in arms if repeat % 2 else arms[::-1]:
            if arm == "off":
                took = run(stock, asked, None)
            else:
                path = str(profile) if arm == "watched" else None
                guarded.llm.collective_rpc("headguard_set_profile", args=("", path))
                took = run(guarded, asked, watch if arm == "watched" else None)
            if repeat:
                seconds[arm].append(took)
        bar("repetitions", repeat + 1, repeats + 1)
    return seconds


def _loss(off: Sequence[float], on: Sequence[float]) -> dict[str, Any]:
    """Throughput off / on - 1, median over repetitions, with its 95 % bootstrap interval and the range seen."""
    figure = bootstrap([off, on], lambda a, b: np.median(b / a, axis=-1) - 1)
    assert figure is not None
    each = [b / a - 1 for a, b in zip(off, on, strict=True)]
    return {**figure.model_dump(), "least": min(each), "most": max(each)}


def _parameters(base: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return total


if __name__ == "__main__":
    app()
