"""The calibration report: what is normal for one revision, and which false-alarm rate that supports, on one page.

All of it comes from the profile: its held-out clean requests were only ever scored. Requests measured afresh add what
these cannot say of themselves: whether new clean requests keep the promise, and what triggered ones would have met. No
prompt text is shown.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import ks_2samp

from guard.calibration import oddness_at
from guard.detector import Detector
from guard.profile import Profile
from guard.readings import Measurement
from guard.signals import SIGNALS, fused, weight_of
from guard.support import Support, statement, supports
from guard.verdict import Window

FUSED = "fused"
_FRESH_TOO_FEW = 20  # fewer fresh requests than that make no curve

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } img { max-width: 100%; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
.no { color: #b3261e; font-weight: 600; } code { font-size: .85em; overflow-wrap: anywhere; }"""


def write_report(
    profile: Profile,
    folder: str | Path,
    *,
    alpha: float = 0.01,
    window: Window = "all",
    measurement: Measurement | None = None,
    labels: np.ndarray | None = None,
) -> Path:
    """Write ``folder``/index.html and its plots; returns the path of the page.

    ``measurement`` are n requests that took no part in the calibration, measured through the same probe and revision;
    ``labels`` bool [n] says which of them were triggered (default: none of them). Clean ones are tested for uniform
    p-values, triggered ones are shown beside the clean ones and in a ROC. Raises ValueError when there are not as many
    labels as requests.
    """
    from guard import calibration_plots as plots

    n = len(measurement) if measurement is not None else 0
    triggered = np.zeros(n, dtype=bool) if labels is None else np.asarray(labels, dtype=bool)
    if len(triggered) != n:
        raise ValueError(f"{len(triggered)} labels for {n} measured requests.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = _maxima(profile, profile.odd, window)
    fresh = _maxima(profile, _oddness(profile, measurement), window) if measurement is not None else {}
    p_values = _p_values(profile, measurement, window)
    scored = np.isfinite(p_values)
    hit = {name: values[triggered & scored] for name, values in fresh.items()} if (triggered & scored).any() else {}
    new_clean = {name: values[~triggered & scored] for name, values in fresh.items()}

    rows = supports(profile, alpha, window)
    streams = _streams(profile, window, held_out[FUSED], p_values[~triggered & scored])
    plots.draw_maps(_maps(profile), folder / "similarity.png")
    plots.draw_oddness(held_out, hit, [r.threshold for r in rows if r.threshold is not None], folder / "oddness.png")
    plots.draw_uniform({label: mine for label, (mine, _) in streams.items()}, folder / "uniform.png")
    plots.draw_lengths(profile.prompt_len, [(r.low, r.high, r.held_out) for r in rows], folder / "lengths.png")
    figures = [
        ("similarity.png", "Mean similarity of heads at the last prompt position, clean requests"),
        ("oddness.png", "Oddness of held-out clean requests by signal, the largest over all checkpoints"),
        ("uniform.png", "p-values of clean requests; right: the small ones"),
        ("lengths.png", "Prompt lengths of the held-out requests, and length buckets"),
    ]
    tests = [
        (label, len(mine), float(ks_2samp(mine, others, method="asymp").pvalue))
        for label, (mine, others) in streams.items()
    ]
    rates = _rates(p_values, triggered, alpha)
    if hit:
        clean = new_clean if len(new_clean[FUSED]) >= _FRESH_TOO_FEW else held_out
        curves = {name: roc(clean[name], hit[name]) for name in (FUSED, *profile.signals)}
        plots.draw_roc(curves, alpha, folder / "roc.png")
        figures.insert(2, ("roc.png", "Triggered requests against clean ones, by signal"))
        rates += [(f"AUROC of {name}", f"{area:.3f}") for name, (_, _, area) in curves.items()]
    page = _page(profile, rows, alpha, window, tests, rates, figures)
    part = folder / "index.html.part"
    part.write_text(page, encoding="utf-8")
    part.replace(folder / "index.html")
    return folder / "index.html"


def roc(clean: np.ndarray, triggered: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """False-alarm rates, hit rates (both rising from 0 to 1) and the area, of scores where high means triggered."""
    thresholds = np.unique(np.concatenate((clean, triggered)))[::-1]
    false_alarms = np.concatenate(([0.0], 1 - np.searchsorted(np.sort(clean), thresholds) / len(clean)))
    hits = np.concatenate(([0.0], 1 - np.searchsorted(np.sort(triggered), thresholds) / len(triggered)))
    return false_alarms, hits, float(np.trapezoid(hits, false_alarms))


def _oddness(profile: Profile, measurement: Measurement) -> np.ndarray:
    """Oddness of measured requests as the profile holds it for its own: [n, C, K], NaN where one had ended."""
    odd = np.full((len(measurement), len(profile.checkpoints), len(profile.signals)), np.nan)
    for column, point in enumerate(profile.checkpoints):
        if point.step in measurement.at and len(measurement.at[point.step].index):
            readings = measurement.reached(point.step)
            odd[:, column] = oddness_at(point, readings, np.arange(len(measurement)), profile.signals)
    return odd


def _maxima(profile: Profile, odd: np.ndarray, window: Window) -> dict[str, np.ndarray]:
    """Largest oddness over the window's checkpoints, by signal and fused: odd [n, C, K] -> [n] each, NaN unmeasured."""
    steps = profile.within(window)
    inside = odd[:, [point.step in steps for point in profile.checkpoints]]
    used = inside[..., [profile.signals.index(name) for name in profile.fused]]
    together = fused(used, profile.fused, steps, profile.weights)
    named = {FUSED: together} | {name: inside[..., k] for k, name in enumerate(profile.signals)}
    return {name: np.fmax.reduce(values, axis=1) for name, values in named.items()}


def _p_values(profile: Profile, measurement: Measurement | None, window: Window) -> np.ndarray:
    if measurement is None:
        return np.zeros(0)
    return Detector(profile, window, profile.smallest_alpha(window)).p_values(measurement)


def _maps(profile: Profile) -> np.ndarray:
    """Mean similarities at step 0 as [L, H, H], averaged on the arctanh scale."""
    rows, columns = np.triu_indices(profile.heads, k=1)
    maps = np.tile(np.eye(profile.heads), (profile.layers, 1, 1))
    maps[:, rows, columns] = np.tanh(profile.checkpoints[0].pairs["mean"]).reshape(profile.layers, -1)
    maps[:, columns, rows] = maps[:, rows, columns]
    return maps


def _streams(
    profile: Profile, window: Window, maxima: np.ndarray, fresh: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """p-values of clean requests that should be alike, each with those they are compared with.

    Fresh ones are compared with the held-out ones, each of which is ranked among the others. (A comparison with the
    uniform would hold the luck of one finite calibration against it.) Without fresh ones, each third of prompt length
    is compared with the rest: a bucket that mixes unlike prompts would show there.
    """
    p_values = np.empty(len(maxima))
    for bucket in profile.buckets(window):
        inside = (profile.prompt_len >= bucket.low) & (profile.prompt_len <= bucket.high)
        at_least = len(bucket.maxima) - np.searchsorted(bucket.maxima, maxima[inside], side="left")  # with itself
        p_values[inside] = at_least / len(bucket.maxima)
    if len(fresh) >= _FRESH_TOO_FEW:
        return {f"{len(fresh)} fresh clean requests": (fresh, p_values)}
    tokens = profile.prompt_len
    order = np.argsort(tokens, kind="stable")
    return {
        f"held out, {tokens[part].min()} to {tokens[part].max()} tokens": (p_values[part], np.delete(p_values, part))
        for part in np.array_split(order, 3)
    }


def _rates(p_values: np.ndarray, triggered: np.ndarray, alpha: float) -> list[tuple[str, str]]:
    """Shares of fresh requests that would have been flagged, as (what, figure)."""
    found = []
    for name, mine in (("clean", ~triggered), ("triggered", triggered)):
        scored = p_values[mine & np.isfinite(p_values)]
        if mine.any():
            flagged = int((scored <= alpha).sum())
            share = f"{flagged} of {len(scored)}" + (f" ({flagged / len(scored):.2%})" if len(scored) else "")
            found.append((f"fresh {name} requests flagged at alpha = {alpha:g}", share))
            found.append((f"fresh {name} requests that could not be scored", str(int(mine.sum()) - len(scored))))
    return found


def _page(
    profile: Profile,
    rows: Sequence[Support],
    alpha: float,
    window: Window,
    tests: list[tuple[str, int, float]],
    rates: list[tuple[str, str]],
    figures: list[tuple[str, str]],
) -> str:
    said = statement(rows, alpha)
    support = [
        (
            f"{r.low} to {r.high}",
            str(r.held_out),
            f"{r.smallest_alpha:.4g}",
            f"{r.realised[0]:.2%} to {r.realised[1]:.2%}" if r.realised else "not supported",
        )
        for r in rows
    ]
    facts = [("base", profile.key.base), ("adapter", profile.key.adapter), ("engine", profile.key.engine)]
    facts += [
        ("dtype", profile.key.dtype),
        ("window", str(window)),
        ("checkpoints", ", ".join(map(str, profile.steps))),
    ]
    facts += [(name.replace("_", " "), str(value)) for name, value in profile.facts.items()]
    weights = {n: f"{weight_of(n, profile.weights):g}" for n in profile.fused}
    signals = [(n, weights.get(n, "not at all"), SIGNALS[n].reason) for n in profile.signals]
    body = [
        f"<h1>Calibration of <code>{html.escape(profile.key.adapter[:12])}</code></h1>",
        f'<p class="{"no" if said.startswith("NOT") else "yes"}">{html.escape(said)}</p>',
        "<p>The promise is about exchangeable traffic: requests drawn as the calibration prompts were, in any order. "
        "It says nothing about other traffic; <code>guard_profile_stale</code> tells when that has come.</p>",
        _table(("prompt tokens", "held out", "finest alpha", f"realised at {alpha:g}, 99 %"), support),
    ]
    if rates:
        body += ["<h2>Fresh requests</h2>", _table(("what", "figure"), rates)]
    body += ["<h2>Are the p-values of clean requests uniform?</h2>"]
    uniform = [(label, str(n), f"{p:.3g}") for label, n, p in tests]
    body += [_table(("clean requests", "n", "Kolmogorov-Smirnov p"), uniform)]
    for file, title in figures:
        body.append(f'<figure><img src="{file}" alt="{title}"><figcaption>{title}</figcaption></figure>')
    body += ["<h2>Signals</h2>", _table(("signal", "counts in the test", "why it should move"), signals)]
    body += ["<h2>What it belongs to</h2>", _table(("fact", "value"), facts)]
    head = f'<meta charset="utf-8"><title>Calibration report</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(kind: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(value)}</{kind}>" for value in values) + "</tr>"

    return f"<table>{cells('th', header)}\n" + "\n".join(cells("td", row) for row in rows) + "</table>"
