"""The attention-similarity paper's own figures beside ours: its Table 1 and what its Figure 1 counts.

The paper compares heads over the rows of *generated* tokens. A Gram is a sum over rows, so theirs is the Gram at a
checkpoint less the Gram of the last prompt position. Pairs here are within a layer. A request counts with the last
checkpoint that its answer reached; one that ended before any generated token was read has no such rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guard.readings import Measurement
from guard.similarity import pair_cosines
from offline_purify.intervals import bootstrap

TABLE_1 = {
    "BadNets": {"clean": 0.9149, "triggered": 0.9921},
    "HiddenKiller": {"clean": 0.8854, "triggered": 0.9717},
    "CBA": {"clean": 0.9298, "triggered": 0.9954},
}
"""99th percentile of attention cosine similarity, Llama-2-7B (attention-similarity paper, table 1)."""
FIGURE_1 = "a chart, without numbers, of more pairs above 0.99 under triggers than on clean prompts"
LIKE = {"word": "BadNets", "prefix": "BadNets", "composite": "CBA"}
"""Our trigger kinds and the paper's attack that each is nearest to."""


def generated_cosines(measurement: Measurement) -> np.ndarray:
    """Head-pair cosines over generated rows, float64 [m, P], for the m requests with at least one such row."""
    first = measurement.at[0]
    row_at_first = {int(index): row for row, index in enumerate(first.index)}
    latest: dict[int, np.ndarray] = {}
    for step in sorted(measurement.at):
        if step == 0:
            continue
        readings = measurement.at[step]
        for row, index in enumerate(readings.index.tolist()):
            gram = readings.gram[row] - first.gram[row_at_first[index]]
            latest[index] = pair_cosines(gram[None])[0]
    return np.stack([latest[index] for index in sorted(latest)]) if latest else np.empty((0, 0))


def paper_figures(clean: Measurement, triggered: Measurement) -> dict[str, Any]:
    """Mean over requests of ``p99`` and ``frac99``, clean and triggered, each {value, low, high, n} or None.

    ``generated`` is the paper's reading; ``prompt`` is the same over the row of the last prompt position alone.
    """
    found: dict[str, Any] = {}
    for rows in ("generated", "prompt"):
        found[rows] = {"p99": {}, "frac99": {}}
        for name, measurement in (("clean", clean), ("triggered", triggered)):
            cosines = generated_cosines(measurement) if rows == "generated" else measurement.at[0].cosines
            some = bool(cosines.size)
            found[rows]["p99"][name] = _mean(np.quantile(cosines, 0.99, axis=1)) if some else None
            found[rows]["frac99"][name] = _mean((cosines > 0.99).mean(axis=1)) if some else None
    return found


def _mean(values: np.ndarray) -> dict[str, Any] | None:
    figure = bootstrap([values.tolist()], lambda column: column.mean(-1))
    return None if figure is None else figure.model_dump()
