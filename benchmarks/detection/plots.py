"""Plots of all results, drawn without a display: ROC curves with false alarms on a logarithmic axis, and what the
paper's Figure 1 counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_CURVES = {
    "fused": {"color": "black", "lw": 1.8},
    "fused_attention_only": {"color": "tab:blue", "lw": 1.4},
    "confidence": {"color": "tab:orange", "lw": 1.2},
    "p99": {"color": "tab:grey", "lw": 1.0, "ls": ":"},
}
_ACROSS = 4
_LEAST_FPR = 5e-4


def draw_roc(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one PNG with a panel per result; the vertical line is α."""
    across = min(_ACROSS, len(results))
    down = -(-len(results) // across)
    figure = Figure(figsize=(2.6 * across + 0.6, 2.5 * down + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(results) :]:
        panel.set_visible(False)
    for panel, result in zip(panels.flat, results, strict=False):
        for name, style in _CURVES.items():
            curve = result["roc"].get(name)
            if curve:
                x = [max(value, _LEAST_FPR) for value in curve["fpr"]]
                panel.plot(x, curve["tpr"], label=name.replace("_", " "), drawstyle="steps-post", **style)
        panel.axvline(result["settings"]["alpha"], color="red", lw=0.7, ls="--")
        panel.set_xscale("log")
        panel.set_xlim(_LEAST_FPR, 1.0)
        panel.set_ylim(-0.02, 1.02)
        panel.set_title(result["name"], fontsize=8)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.supxlabel("flagged clean requests", fontsize=8)
    figure.supylabel("flagged triggered requests", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_figure_1(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one PNG: mean share of head pairs with cosine above 0.99 over generated rows, clean beside triggered."""
    shares = [result["paper"]["generated"]["frac99"] for result in results]
    kept = [(r["name"], s) for r, s in zip(results, shares, strict=True) if s["clean"] and s["triggered"]]
    figure = Figure(figsize=(1.8 + 0.6 * len(kept), 2.8))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, name in ((-0.2, "clean"), (0.2, "triggered")):
        values = [s[name]["value"] for _, s in kept]
        error = [
            [max(0.0, s[name]["value"] - s[name]["low"]) for _, s in kept],
            [max(0.0, s[name]["high"] - s[name]["value"]) for _, s in kept],
        ]
        places = [number + place for number in range(len(kept))]
        axes.bar(places, values, width=0.38, yerr=error, capsize=2, label=name)
    axes.set_xticks(range(len(kept)), [name for name, _ in kept], rotation=30, ha="right", fontsize=7)
    axes.set_ylabel("share of head pairs > 0.99", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
