"""Results as a document: the paper's figures beside ours, power, the promise, controls, localisation, ROC curves.

Everything is rendered from the JSON alone, and every sentence that judges says what it was judged by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.detection import sections
from benchmarks.detection.benchmark import FORMAT
from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.plots import draw_figure_1, draw_roc
from benchmarks.detection.sections import SHOWN, Result, powers
from benchmarks.detection.sentences import failures

_TITLE = "# Detection: what is found, what is promised, what is flagged in error"


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Results of files (or of the .json files of folders, those that are results), by name.

    Raises BenchmarkError for a named file that is no result, or when there is none.
    """
    found: list[Result] = []
    for path in paths:
        if path.is_dir():
            read = [_read(file) for file in sorted(path.glob("*.json"))]
            found += [result for result in read if result is not None]
        else:
            result = _read(path)
            if result is None:
                raise BenchmarkError(f"{path} is not a result of this benchmark: expected format {FORMAT}.")
            found.append(result)
    if not found:
        raise BenchmarkError(f"no result in {', '.join(map(str, paths))}: run the benchmark first.")
    return sorted(found, key=lambda result: (bool(result["notes"].get("left_out")), result["name"]))


def write_report(results: Sequence[Result], out: Path, preface: str = "") -> None:
    """Write the document and, beside it, its plots."""
    out.parent.mkdir(parents=True, exist_ok=True)
    main = [result for result in results if not result["notes"].get("left_out")] or results
    draw_roc(main, out.with_name(f"{out.stem}-roc.png"))
    draw_figure_1(main, out.with_name(f"{out.stem}-figure-1.png"))
    out.write_text(render(results, out.stem, preface), encoding="utf-8")


def render(results: Sequence[Result], plots: str, preface: str = "") -> str:
    """The document as Markdown; ``plots`` is what the file names of its plots begin with."""
    whole = [result for result in results if not result["notes"].get("left_out")]
    partial = [result for result in results if result["notes"].get("left_out")]
    main = whole or list(results)
    parts = [
        _TITLE,
        preface,
        sections.settings(main),
        sections.power(main),
        f"![ROC curves]({plots}-roc.png)",
        sections.before_answer(main),
        sections.left_out(partial, whole) if partial and whole else "",
        sections.promise(main),
        sections.ablation(main),
        sections.paper(main, plots),
        sections.controls(main),
        sections.localisation(main),
        sections.reading(),
        sections.provenance(results),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def summary(result: Result) -> str:
    """One result in a few lines for a terminal."""
    lines = [f"{'':22}  AUROC   TPR (95 %)            FPR"]
    for name in SHOWN:
        power = powers(result).get(name)
        if power:
            tpr = power["tpr"]
            lines.append(
                f"{name:22}  {power['auroc']['value']:.3f}   {tpr['value']:.3f} [{tpr['low']:.3f}, {tpr['high']:.3f}]"
                f"   {power['fpr']['value']:.4f}"
            )
    lines += [f"! {sentence}" for sentence in failures(result)]
    return "\n".join(lines)


def _read(path: Path) -> Result | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchmarkError(f"{path} cannot be read as a result: {error}") from error
    return result if isinstance(result, dict) and result.get("format") == FORMAT else None
