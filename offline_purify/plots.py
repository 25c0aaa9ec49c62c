"""The report's plots, drawn without a display: attack success, head map, alignment trace, training losses.

Each function takes what the report already holds and writes one PNG; a plot whose data is absent is not drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TITLES = {
    "asr.png": "Share of requests that show the flagged behaviour, with 95 % intervals",
    "signature.png": "Channels and attention heads silenced in every layer",
    "heads.png": "Safety score of every head; red: aligned, green: reference",
    "similarity.png": "Heads that look alike, before and after, on flagged and on clean prompts",
    "trace.png": "While aligning: flags that fire, and clean perplexity",
    "losses.png": "Training losses",
}


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _asr(report: dict[str, Any], path: Path) -> bool:
    labels = list(report["states"])
    figure = Figure(figsize=(1.6 + 1.1 * len(labels), 3.4))
    axes = figure.subplots()
    for k, (name, text) in enumerate((("flagged_asr", "held-out flags"), ("candidate_asr", "trigger candidates"))):
        points = [(i, report["states"][label][name]) for i, label in enumerate(labels)]
        points = [(i, f) for i, f in points if f]
        if not points:
            continue
        x = np.array([i + 0.18 * (2 * k - 1) for i, _ in points])
        y = np.array([f["value"] for _, f in points])
        error = np.clip(
            [[f["value"] - f["low"] for _, f in points], [f["high"] - f["value"] for _, f in points]], 0, None
        )
        axes.bar(x, y, width=0.34, yerr=error, capsize=3, label=text)
    axes.set_xticks(range(len(labels)), [label.replace("_", " ") for label in labels], rotation=20)
    axes.set_ylim(0, 1.05)
    axes.axhline(report["settings"]["gate"]["flagged_asr_max"], color="grey", lw=0.8, ls="--")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    _save(figure, path)
    return True


def _signature(report: dict[str, Any], path: Path) -> bool:
    stage = report["stages"].get("signature")
    attempts = stage["details"].get("attempts") if stage else None
    if not attempts:
        return False
    done = attempts[stage["details"].get("chosen", -1)]
    figure = Figure(figsize=(5.5, 3.2))
    axes = figure.subplots()
    layers = np.arange(len(done["by_layer"]))
    axes.bar(layers, done["by_layer"], width=0.7)
    axes.axhline(done["channels"], color="grey", lw=0.8, ls="--")
    axes.set_xticks(layers)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"MLP channels of {done['channels']}")
    for layer, heads in enumerate(done["heads_by_layer"]):
        if heads:
            axes.annotate(f"{heads} heads", (layer, done["by_layer"][layer]), ha="center", va="bottom", fontsize=8)
    _save(figure, path)
    return True


def _heads(report: dict[str, Any], path: Path) -> bool:
    stage = report["stages"].get("heads")
    if not stage or "safety" not in stage["details"]:
        return False
    details = stage["details"]
    safety = np.array(details["safety"])
    figure = Figure(figsize=(1.5 + 0.45 * safety.shape[1], 1.4 + 0.4 * safety.shape[0]))
    axes = figure.subplots()
    image = axes.imshow(safety, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes, label="safety")
    if details["attempts"]:
        parts = details["attempts"][details.get("chosen", -1)]["partition"]
        for kind, colour in (("suspicious", "red"), ("safe", "lime")):
            for layer, head in parts[kind]:
                axes.plot(head, layer, "s", ms=13, mfc="none", mec=colour, mew=2)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(safety.shape[1]))
    axes.set_yticks(range(safety.shape[0]))
    _save(figure, path)
    return True


def _similarity(report: dict[str, Any], path: Path) -> bool:
    maps = [
        (f"{label}: {kind} prompts", np.array(grid))
        for label, found in report["similarity"].items()
        for kind, grid in found.items()
        if grid
    ]
    if not maps:
        return False
    layers, heads = maps[0][1].shape
    figure = Figure(figsize=(1.2 + len(maps) * (1.0 + 0.2 * heads), 1.6 + 0.25 * layers), layout="constrained")
    grid = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(grid, maps, strict=True):
        image = axes.imshow(values, cmap="magma", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_title(title.replace("+", ", then "), fontsize=8)
        axes.set_xlabel("head")
    grid[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid), label="cosine with the nearest head")
    _save(figure, path)
    return True


def _trace(report: dict[str, Any], path: Path) -> bool:
    stage = report["stages"].get("heads")
    attempts = [a for a in stage["details"].get("attempts", []) if a.get("trace")] if stage else []
    if not attempts:
        return False
    figure = Figure(figsize=(7.5, 3.2))
    left, right = figure.subplots(1, 2)
    for a in attempts:
        steps = [t["step"] for t in a["trace"]]
        label = f"{a['rule']} {a['lowest']:g}, lr {a['lr']:g}"
        left.plot(steps, [t["fires"] for t in a["trace"]], "o-", label=label)
        right.plot(steps, [t["perplexity_ratio"] for t in a["trace"]], "o-", label=label)
    left.set_ylim(-0.05, 1.05)
    left.set_xlabel("alignment steps")
    left.set_ylabel("training flags that fire")
    right.set_xlabel("alignment steps")
    right.set_ylabel("clean perplexity / before")
    left.legend(frameon=False, fontsize=7)
    _save(figure, path)
    return True


def _losses(report: dict[str, Any], path: Path) -> bool:
    curves: dict[str, list[float]] = {}
    for label, stage in report["stages"].items():
        details = stage["details"]
        if details.get("losses"):
            curves[label] = details["losses"]
        if "finetune_losses" in details.get("attempts", [{}])[details.get("chosen", 0)]:
            curves[f"{label}: fine-tuning"] = details["attempts"][details["chosen"]]["finetune_losses"]
    curves = {label: values for label, values in curves.items() if values}
    if not curves:
        return False
    figure = Figure(figsize=(5.5, 3.2))
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=label, lw=1)
    axes.set_xlabel("step")
    axes.set_ylabel("answer loss, nats per token")
    axes.legend(frameon=False)
    _save(figure, path)
    return True


_PLOTS = {
    "asr.png": _asr,
    "signature.png": _signature,
    "heads.png": _heads,
    "similarity.png": _similarity,
    "trace.png": _trace,
    "losses.png": _losses,
}


def draw_plots(report: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Draw what can be drawn into ``folder``; returns [{"file", "title"}] of what was."""
    drawn = []
    for name, draw in _PLOTS.items():
        if draw(report, folder / name):
            drawn.append({"file": name, "title": _TITLES[name]})
    return drawn
