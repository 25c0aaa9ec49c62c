"""What the guard costs a serving engine: guard off, attached but idle, and watching, interleaved in one run.

Three engines of one model stand side by side, and take their steps in turns:

    off     stock vLLM                       idle    plugin attached, nobody watched
    watched every request read up to the window, its verdict computed with a real profile

So whatever else the machine does falls on all of them alike; and with every repetition, which is one batch from its
prefill to its last token, they exchange their parts. Reported is the median over rounds of three repetitions, in which
each engine has played each part, of the ratio of their seconds. What the guard costs at a step comes back with every
repetition, so it is in the median of that step over the repetitions; what strays further than 5 % from that median is
the machine's, and counts as 5 %. Beside it stands the time spent inside the guard's own functions, which is exact, and
leaves out what they do to the rest (caches, the interpreter).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.overhead.arms import Arm, Engine, Step, engines
from guard.calibration import fit_profile
from guard.gram import Earlier
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

STRAY = 0.05
"""How far a step may be from its median over the repetitions, as a share of it, before the rest is the machine's."""


class Kind(StrEnum):
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
    engine: Annotated[Kind, typer.Option(help="Engine to measure.")] = Kind.vllm,
    shape: Annotated[str, typer.Option(help=f"Random-weight Llama shape: {' or '.join(SHAPES)}.")] = "tiny",
    batch: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.", min=8)] = 256,
    chunk: Annotated[int, typer.Option(help="Tokens computed in one step, at most.", min=16)] = 256,
    new: Annotated[int, typer.Option(help="New tokens per request.", min=2)] = 128,
    window: Annotated[str, typer.Option(help="What is watched: prefill, a number of tokens, or all.")] = "prefill",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Rounds of three repetitions, after one that warms up.", min=2)] = 3,
    threads: Annotated[int, typer.Option(help="Threads of an engine; 0: all cores but one, as vLLM does.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Prompts and weights follow from it.")] = 0,
) -> None:
    """Throughput lost to the guard, as ratios within one run."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}: expected {' or '.join(SHAPES)}.", param_hint="--shape")
    if window not in ("prefill", "all") and not window.isdigit():
        raise typer.BadParameter("expected prefill, all or a number of tokens.", param_hint="--window")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a stopped run takes its engines with it
    threads = threads or max(1, (os.cpu_count() or 1) - 1)
    watched: Window = int(window) if window.isdigit() else window  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, ProgressBar() as bar:
        base = Path(folder) / "base"
        _save_model(base, SHAPES[shape], prompt + new, seed)
        told = _measure(base, Path(folder), watched, batch, prompt, chunk, new, dtype, rounds, threads, seed, bar)
    told = {
        "engine": engine.value, "shape": shape, "parameters": told.pop("parameters"), "dtype": dtype, "batch": batch,
        "prompt_tokens": prompt, "chunk": chunk, "new_tokens": new, "window": watched, "rounds": rounds, "seed": seed,
        "device": "cuda" if torch.cuda.is_available() else "cpu", "threads": threads, **told,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shares = {
        name: f"{told[name]:.2%} [{', '.join(f'{end:.2%}' for end in told[f'{name}_interval'])}]"
        for name in ("throughput_loss", "idle_loss")
    }
    typer.echo(
        f"{out}: window {window} costs {shares['throughput_loss']} of throughput, attached and idle "
        f"{shares['idle_loss']} (n = {rounds}); inside the guard: {told['inside']['watched']:.2%} of the time, idle "
        f"{told['inside']['idle']:.3%}."
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
    base: Path, folder: Path, window: Window, batch: int, prompt: int, chunk: int, new: int, dtype: str, rounds: int,
    threads: int, seed: int, bar: ProgressBar,
) -> dict[str, Any]:  # fmt: skip
    rng = random.Random(seed)
    vocabulary = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    options: dict[str, Any] = {
        "skip_tokenizer_init": True, "max_model_len": prompt + new, "max_num_seqs": batch, "seed": seed,
        "enable_prefix_caching": False, "max_num_batched_tokens": max(chunk, batch),
    }  # fmt: skip
    if torch.cuda.is_available():
        options |= {"enforce_eager": False, "gpu_memory_utilization": 0.25}

    def prompts(n: int) -> list[list[int]]:
        return [[rng.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(n)]

    bar("engines and a profile", 0, 1)
    with engines(base, dtype, options, threads) as players:
        last = new if window == "all" else 1 if window == "prefill" else int(window) + 1
        clean = _copied(players[0].measure(prompts(DRAWN), checkpoints_within(last), last), seed)
        status = players[0].status()
        key = ProfileKey("0" * 64, NO_ADAPTER, ENGINE, status["dtype"], status["key"])
        profile = fit_profile(clean, key, seed=seed)
        path = folder / "profile.safetensors"
        profile.save(path)
        watch = {FIELD: {"window": window, "alpha": profile.smallest_alpha(window), "stop": False, "fail": "open"}}
        bar("engines and a profile", 1, 1)
        runs = []
        for repeat in range(-1, len(Arm) * rounds):  # the first one warms up
            parts = {arm: players[(repeat + number) % len(Arm)] for number, arm in enumerate(Arm)}
            for arm, player in parts.items():
                player.play(arm, path)
            runs.append(_repetition(parts, prompts(batch), new, watch, rng))
            bar("repetitions", repeat + 2, len(Arm) * rounds + 1)
        counted = [player.status() for player in players]
    seconds = {arm: np.asarray([[step.seconds for step in run[arm]] for run in runs[1:]]) for arm in Arm}
    inside = {arm: np.asarray([[step.inside for step in run[arm]] for run in runs[1:]]) for arm in Arm}
    typical = {arm: np.median(took, axis=0) for arm, took in seconds.items()}
    return {
        "parameters": int(_parameters(base)),
        **_loss("throughput_loss", seconds[Arm.off], seconds[Arm.watched]),
        **_loss("idle_loss", seconds[Arm.off], seconds[Arm.idle]),
        "inside": {arm: float(inside[arm].sum() / seconds[arm].sum()) for arm in Arm},
        "tokens_per_second": {arm: batch * new / took.sum() for arm, took in typical.items()},
        "decode_step_s": {arm: float(np.median(took)) for arm, took in typical.items()},
        "seconds": {arm: took.sum(axis=1).tolist() for arm, took in seconds.items()},
        "step_seconds": {arm: np.round(took, 6).tolist() for arm, took in seconds.items()},
        "steps": len(runs[0][Arm.off]),
        "rows_watched": sum(status["planned_rows"] for status in counted),
        "rows_seen": sum(status["seen_rows"] for status in counted),
        "checkpoints": list(profile.within(window)),
    }


def _copied(drawn: Measurement, seed: int) -> Measurement:
    """COPIES of every request, Grams scaled by a few per cent."""
    rng = torch.Generator().manual_seed(seed)
    at = {}
    for step, readings in drawn.at.items():
        gram, sink, norms = _noisy(readings.gram, readings.sink, readings.norms, rng)
        at[step] = Readings(
            step,
            np.concatenate([readings.index + copy * len(drawn) for copy in range(COPIES)]),
            gram,
            sink,
            norms,
            np.tile(readings.logprobs, (COPIES, 1)),
            [focus for _ in range(COPIES) for focus in readings.focus],
            earlier=None if readings.earlier is None else Earlier(*_noisy(*readings.earlier, rng)),
        )
    return Measurement(np.tile(drawn.prompt_len, COPIES), [a for _ in range(COPIES) for a in drawn.answers], at)


def _noisy(
    gram: torch.Tensor, sink: torch.Tensor, norms: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """COPIES of Grams [n, ..., H, H], sinks [n, ..., H] and log norms [n, ..., W], each off by a few per cent of its
    own."""
    grams, sinks, logs = (part.repeat(COPIES, *[1] * (part.dim() - 1)) for part in (gram, sink, norms))
    noise = 1 + 0.03 * torch.randn(grams.shape, generator=rng)
    sinks = sinks * (1 + 0.03 * torch.randn((*sinks.shape[:-1], 1), generator=rng))
    return grams * (noise + noise.mT) / 2, sinks, logs + 0.03 * torch.randn(logs.shape, generator=rng)


def _repetition(
    parts: Mapping[Arm, Engine], prompts: Sequence[Sequence[int]], new: int, watch: dict[str, Any], rng: random.Random
) -> dict[Arm, list[Step]]:
    """Every step of one batch, by arm; who goes first is drawn anew for each step."""
    for arm, player in parts.items():
        player.add(prompts, new, watch if arm == Arm.watched else None)
    taken: dict[Arm, list[Step]] = {arm: [] for arm in parts}
    while True:
        steps = {arm: parts[arm].step() for arm in rng.sample(list(parts), len(parts))}
        if None in steps.values():
            return taken
        for arm, step in steps.items():
            taken[arm].append(step)  # type: ignore[arg-type]


def _loss(name: str, off: np.ndarray, on: np.ndarray) -> dict[str, Any]:
    """Throughput off / on - 1 of seconds [repetition, step]: ``name`` is its median over rounds, ``name_interval`` the
    95 % bootstrap interval of that, ``name_rounds`` each round's."""
    off_s, on_s = (_steadied(took).sum(axis=1).reshape(-1, len(Arm)).sum(axis=1) for took in (off, on))
    each = on_s / off_s - 1
    figure = bootstrap([each], lambda rounds: np.median(rounds, axis=-1))
    assert figure is not None
    return {name: figure.value, f"{name}_interval": [figure.low, figure.high], f"{name}_rounds": each.tolist()}


def _steadied(took: np.ndarray) -> np.ndarray:
    """Seconds [repetition, step], none further than STRAY from the step's median over the repetitions."""
    typical = np.median(took, axis=0)
    return np.clip(took, (1 - STRAY) * typical, (1 + STRAY) * typical)


def _parameters(base: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return total


if __name__ == "__main__":
    app()
