"""ROC curves of all results, drawn without a display: one panel each, false alarms on a logarithmic axis."""

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
    figure = Figure(figsize=(3.1 * across, 2.9 * down + 0.4))
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
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.supxlabel("flagged clean requests", fontsize=8, y=0.06)
    figure.supylabel("flagged triggered requests", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
