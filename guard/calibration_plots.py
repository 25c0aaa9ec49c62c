"""The calibration report's plots, drawn without a display. Arrays in, one PNG out; nothing is computed here.

Import it late: matplotlib takes its time, and only reports need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_CLEAN, _TRIGGERED, _GREY = "#2a6fb0", "#b3261e", "#889"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _grid(panels: int, width: float, height: float, across: int) -> tuple[Figure, list]:
    """A figure with room for so many panels (each width x height inches), and their axes."""
    columns = min(across, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def draw_maps(maps: np.ndarray, path: Path) -> None:
    """Mean head similarities [L, H, H], one map per layer."""
    figure, axes = _grid(len(maps), 2.1, 2.2, across=6)
    for layer, (panel, similarity) in enumerate(zip(axes, maps, strict=True)):
        image = panel.imshow(similarity, vmin=0.0, vmax=1.0, cmap="viridis")
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.tick_params(labelsize=6)
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    _save(figure, path)


def draw_oddness(
    clean: Mapping[str, np.ndarray], triggered: Mapping[str, np.ndarray], thresholds: Sequence[float], path: Path
) -> None:
    """Histograms of oddness by signal: of clean requests [n], of triggered ones [m] where there are any; the test's
    ``thresholds`` (one a length bucket) are marked on "fused"."""
    figure, axes = _grid(len(clean), 3.3, 2.5, across=3)
    for panel, (name, values) in zip(axes, clean.items(), strict=True):
        there = [values, triggered[name]] if triggered else [values]
        top = max(1.0, *(float(v.max(initial=0.0)) for v in there))
        bins = np.linspace(0.0, top, 40)
        for part, colour, label in zip(there, (_CLEAN, _TRIGGERED), ("clean", "triggered"), strict=False):
            panel.hist(part, bins=bins, color=colour, alpha=0.65, label=label, density=True)
        for number, threshold in enumerate(thresholds if name == "fused" else ()):
            panel.axvline(threshold, color="black", lw=1, ls="--", label=None if number else "flagged beyond")
        panel.set_yscale("log")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("oddness, -log10 tail probability", fontsize=8)
        panel.legend(frameon=False, fontsize=7)
    _save(figure, path)


def draw_uniform(streams: Mapping[str, np.ndarray], path: Path) -> None:
    """p-values of clean requests by group, sorted against the uniform, with the 99 % band of the smallest group."""
    figure, (plain, small) = _grid(2, 3.6, 3.4, across=2)
    smallest = min(len(values) for values in streams.values())
    for panel, limit in ((plain, 1.0), (small, 0.1)):
        panel.plot([0, limit], [0, limit], color=_GREY, lw=1)
        if limit == 1.0:
            half = 1.63 / np.sqrt(smallest)  # Kolmogorov's distribution at 0.99
            panel.fill_between([0, 1], [-half, 1 - half], [half, 1 + half], color=_GREY, alpha=0.15, lw=0)
        for label, values in streams.items():
            share = np.arange(1, len(values) + 1) / len(values)
            panel.step(np.sort(values), share, where="post", lw=1.2, label=label)
        panel.set_xlim(0, limit)
        panel.set_ylim(0, limit)
        panel.set_xlabel("p-value")
        panel.set_ylabel("share of clean requests at or below")
    plain.legend(frameon=False, fontsize=7)
    _save(figure, path)


def draw_roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]], alpha: float, path: Path) -> None:
    """ROC by signal: (false-alarm rates, hit rates, area) each; once as usual, once on a log scale around alpha."""
    figure, (plain, small) = _grid(2, 4.0, 3.8, across=2)
    for name, (false_alarms, hits, area) in curves.items():
        style = {"lw": 2.2, "color": "black"} if name == "fused" else {"lw": 1.0}
        for panel in (plain, small):
            panel.plot(false_alarms, hits, label=f"{name} {area:.3f}", **style)
    for panel in (plain, small):
        panel.axvline(alpha, color=_GREY, lw=0.8, ls="--")
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("clean requests flagged")
        panel.set_ylabel("triggered requests flagged")
    small.set_xscale("log")
    small.set_xlim(alpha / 10, 1)
    plain.legend(frameon=False, fontsize=7, title="area under the curve", title_fontsize=7)
    _save(figure, path)


def draw_lengths(prompt_len: np.ndarray, buckets: Sequence[tuple[int, int, int]], path: Path) -> None:
    """Prompt tokens of the held-out requests [n], with the buckets (low, high, held out)."""
    figure, (panel,) = _grid(1, 6.5, 2.6, across=1)
    panel.hist(prompt_len, bins=min(60, int(np.ptp(prompt_len)) + 1), color=_CLEAN, alpha=0.7)
    for low, high, held_out in buckets:
        panel.axvline(high + 0.5, color="black", lw=0.8, ls="--")
        panel.text((low + high) / 2, panel.get_ylim()[1] * 0.92, f"n = {held_out}", ha="center", fontsize=8)
    panel.set_xlabel("prompt tokens")
    panel.set_ylabel("held-out requests")
    _save(figure, path)
