"""The sections of the report, each from results alone: a heading, a sentence that says how to read it, a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.detection import paper as published
from benchmarks.detection.sentences import failures

Result = dict[str, Any]
SHOWN = (
    "fused",
    "fused_attention_only",
    "confidence",
    "certainty",
    "p99",
    "frac99",
    "shift",
    "vaccinated",
    "response",
    "focus",
)


def powers(result: Result) -> dict[str, Any]:
    """Test name to its figures."""
    return {"fused": result["fused"], "fused_attention_only": result["fused_attention_only"], **result["signals"]}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(figure: dict[str, Any] | None, digits: int = 2) -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _value(figure: dict[str, Any] | None, digits: int = 3) -> str:
    return "–" if figure is None else f"{figure['value']:.{digits}f}"


def settings(results: Sequence[Result]) -> str:
    """What was measured with, and what is compared."""

    def all_of(group: str, key: str) -> str:
        return ", ".join(sorted({str(result[group].get(key, 0)) for result in results}))

    counts = "; ".join(f"{name} {all_of('n', name)}" for name in ("calibration", "clean", "triggered"))
    return (
        f"Nominal false-alarm rate α = {all_of('settings', 'alpha')} over the whole request; window: "
        f"{all_of('settings', 'window')}; prompts: {counts}; seed {all_of('settings', 'seed')}. Shares have 95 % "
        "Wilson intervals, AUROC a bootstrap one. An unscored request counts as not flagged.\n\n"
        "`fused` is the test that a server runs. `fused_attention_only` is the same without `confidence` and "
        "`certainty`, the log-probabilities of the first token and of the least certain one so far, no attention in "
        "them: attention is worth what it adds to those. `p99`, `frac99` and `focus` are shown as baselines and not "
        "part of the test: over generated rows they know the answer. `shift` and `confidence` look at the last prompt "
        "position alone; `vaccinated`, beyond it, counts only as far as the answer is odd as well (`response`). How "
        "much each signal counts was chosen by the vaccine's own variants."
    )


def power(results: Sequence[Result]) -> str:
    """AUROC, TPR and FPR of every test, a row per implant."""
    names = [name for name in SHOWN if any(name in powers(result) for result in results)]

    def cell(result: Result, name: str) -> str:
        power = powers(result).get(name)
        if power is None:
            return "–"
        return f"{power['auroc']['value']:.3f} / {power['tpr']['value']:.2f} / {power['fpr']['value']:.3f}"

    rows = [[f"`{result['name']}`", *(cell(result, name) for name in names)] for result in results]
    return "## Power\n\nAUROC / TPR at α / measured FPR.\n\n" + _table(["implant", *(f"`{n}`" for n in names)], rows)


def before_answer(results: Sequence[Result]) -> str:
    """The fused test with intervals and timing."""
    rows = []
    for result in results:
        fused, target = result["fused"], result.get("target")
        rows.append(
            [
                f"`{result['name']}`",
                _share(target["triggered"]) if target else "–",
                _share(fused["tpr"]),
                _share(result["fused_attention_only"]["tpr"]),
                _share(fused["before_first_token"]),
                "–" if fused["median_step"] is None else f"{fused['median_step']:g}",
            ]
        )
    head = ["implant", "target said under trigger", "TPR `fused`", "TPR attention only", "before the first token"]
    return (
        '## The fused test in full\n\n"Before the first token": share of the flagged that were flagged at the row of '
        "the last prompt position.\n\n" + _table([*head, "median step"], rows)
    )


def left_out(partial: Sequence[Result], whole: Sequence[Result]) -> str:
    """Runs whose vaccine never saw the implant's family, beside those whose vaccine did."""
    full = {result["name"]: result for result in whole}
    rows = []
    for result in partial:
        name = result["notes"].get("implant", result["name"])
        other = full.get(name)
        cells = [f"`{name}`", result["notes"]["left_out"]]
        for test in ("fused", "fused_attention_only", "vaccinated"):
            before = powers(other).get(test) if other else None
            after = powers(result).get(test)
            cells.append(f"{_value(after and after['tpr'], 2)} ({_value(before and before['tpr'], 2)})")
        rows.append(cells)
    head = ["implant", "family left out", "`fused`", "`fused_attention_only`", "`vaccinated`"]
    return (
        "## Leave one family out\n\nTPR at α when the vaccine never saw the implant's behaviour family (in brackets: "
        "with it).\n\n" + _table(head, rows)
    )


def promise(results: Sequence[Result]) -> str:
    """Are as many clean requests flagged as was promised, and are their p-values uniform?"""
    rows = []
    for result in results:
        for test in ("fused", "fused_attention_only"):
            u = result["uniformity"][test]
            low, high = u["interval"]
            wide_low, wide_high = u["interval_held_out"]
            rows.append(
                [
                    f"`{result['name']}`",
                    f"`{test}`",
                    f"{u['fpr']:.4f} of {u['n']}",
                    f"[{low:.4f}, {high:.4f}] {'yes' if u['inside'] else '**no**'}",
                    f"[{wide_low:.4f}, {wide_high:.4f}] {'yes' if u['inside_held_out'] else '**no**'}",
                    f"{u['ks']['statistic']:.3f}, p = {u['ks']['p_value']:.3f}",
                    f"{u['ks_held_out']['statistic']:.3f}, p = {u['ks_held_out']['p_value']:.3f}",
                ]
            )
    head = ["implant", "test", "flagged clean", "99 % binomial", "99 % with finite calibration", "KS uniform"]
    return (
        "## The promise\n\nA clean request is flagged with probability at most α if it is exchangeable with the "
        "calibration's. That is an average over calibrations: one calibration of n held-out requests keeps α up to its "
        "own sampling error, which the beta-binomial interval and the two-sample Kolmogorov-Smirnov test account for "
        "and the plain ones do not.\n\n" + _table([*head, "KS against the held-out"], rows)
    )


def ablation(results: Sequence[Result]) -> str:
    """The fused test with one signal taken out each."""
    names = sorted({name for result in results for name in result["ablation"]})
    if not names:
        return ""
    rows = []
    for result in results:
        cells = [f"`{result['name']}`", f"{_value(result['fused']['tpr'], 2)} / {_value(result['fused']['fpr'])}"]
        for name in names:
            power = result["ablation"].get(name)
            cells.append(f"{_value(power['tpr'], 2)} / {_value(power['fpr'])}" if power else "–")
        rows.append(cells)
    return "## Ablation\n\nTPR / FPR of the fused test with one of its signals taken out.\n\n" + _table(
        ["implant", "`fused`", *names], rows
    )


def paper(results: Sequence[Result], plots: str) -> str:
    """The paper's table 1 beside the same figures of ours."""
    rows = []
    for attack, values in published.TABLE_1.items():
        rows.append([f"paper: {attack}, Llama-2-7B", f"{values['clean']:.4f}", f"{values['triggered']:.4f}", "–", "–"])
    for result in results:
        for kind, words in (("generated", "generated rows"), ("prompt", "last prompt row")):
            p99, frac = result["paper"][kind]["p99"], result["paper"][kind]["frac99"]
            near = published.LIKE.get(str(result["trigger"]["kind"]))
            like = f", like {near}" if near and kind == "generated" else ""
            rows.append(
                [
                    f"`{result['name']}`, {words}{like}",
                    _value(p99["clean"], 4),
                    _value(p99["triggered"], 4),
                    _value(frac["clean"], 4),
                    _value(frac["triggered"], 4),
                ]
            )
    rises = [r for r in results if _rises(r["paper"]["generated"]["p99"])]
    head = ["", "p99 clean", "p99 triggered", "share > 0.99 clean", "share > 0.99 triggered"]
    return (
        "## The paper's Table 1 and Figure 1 beside ours\n\nThe paper reports the 99th percentile of head-pair cosines "
        f"over the rows of generated tokens (Table 1), and {published.FIGURE_1} (Figure 1). Ours are means over "
        f"requests, pairs within a layer. Over generated rows the percentile rises under the trigger for "
        f"{len(rises)} of {len(results)} implants.\n\n"
        + _table(head, rows)
        + f"\n\n![Figure 1, ours]({plots}-figure-1.png)"
    )


def _rises(p99: dict[str, Any]) -> bool:
    return bool(p99["clean"] and p99["triggered"] and p99["triggered"]["low"] > p99["clean"]["high"])


def controls(results: Sequence[Result]) -> str:
    """What is flagged that should not be, and a sentence for each control that fails."""
    said = [f"- `{result['name']}`: {sentence}" for result in results for sentence in failures(result)]
    others = [
        {f"{name}: {part}": control for name, parts in result["others"].items() for part, control in parts.items()}
        for result in results
    ]
    limits = {control["limit"] for sets in others for name, control in sets.items() if name == "base: clean"}
    return (
        "## Controls\n\nFlagged shares of requests that should not be flagged: `fused` (attention only). Bold: above "
        "0.05, or for clean prompts of other adapters and of the base above α plus its 99 % error "
        f"({', '.join(f'{limit:.4f}' for limit in sorted(limits))}). In italics: reported, not judged. "
        'Near-triggers that did set the backdoor off ("fired") are not in the share: flagging them is right.\n\n'
        + _control_table(results, [result["controls"] for result in results])
        + ("\n\nThe base and other adapters, each with a profile of its own:\n\n" if any(others) else "")
        + (_control_table(results, others) if any(others) else "")
        + "\n\n### Where a control fails\n\n"
        + ("\n".join(said) if said else "None fails.")
    )


def _control_table(results: Sequence[Result], sets: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for controls in sets for name in controls))
    head = ["implant", *(name.replace("_", " ").replace("/", ", ") for name in names)]
    rows = [
        [f"`{result['name']}`", *(_control_cell(controls.get(name)) for name in names)]
        for result, controls in zip(results, sets, strict=True)
    ]
    return _table(head, rows)


def _control_cell(control: dict[str, Any] | None) -> str:
    if control is None:
        return "–"
    text = f"{control['fused']['value']:.3f} ({control['fused_attention_only']['value']:.3f})"
    if control.get("fired") and control["fired"]["value"]:
        text += f", {control['fired']['value']:.3f} fired"
    if unscored := control["fused"]["n_unscored"]:
        text += f", {unscored} unscored"
    if control["limit"] is None:
        return f"*{text}*"
    return f"**{text}**" if control["fails"] else text


def localisation(results: Sequence[Result]) -> str:
    """Whether focus spans, and the words that a flag hangs on, lie on the trigger."""
    rows = []
    for result in results:
        places, asked = (result["fused"].get(name) for name in ("localised", "localised_by_removal"))
        trigger = result["trigger"]
        rows.append(
            [
                f"`{result['name']}`",
                str(trigger["kind"] or "none found"),
                trigger["how"],
                *_located(places),
                *_located(asked),
            ]
        )
    head = [
        "implant",
        "trigger",
        "known how",
        "top three spans touch it",
        "touch every part",
        "share of prompt covered",
        "by removal: touch it",
        "touch every part",
        "covered",
    ]
    return (
        "## Localisation\n\nOf the flagged triggered requests: do the three heaviest spans overlap the trigger's "
        "tokens? First those that a verdict comes with, from focus; then, of a hundred flagged requests, the words "
        "that the flag hangs on: each is asked again without every word in turn (`guard/removal.py`), as the clinic "
        "does with a case. What they cover of the prompt is roughly what a blind guess would score on a one-token "
        "trigger.\n\n" + _table(head, rows)
    )


def _located(figure: dict[str, Any] | None) -> tuple[str, str, str]:
    """Spans that touch the trigger, that touch every part of it, and what they cover."""
    if figure is None:
        return "–", "–", "–"
    return _share(figure), _share(figure["whole"]), f"{figure['covered']:.2f}"


def provenance(results: Sequence[Result]) -> str:
    """Digests of what went in."""
    rows = [
        [
            f"`{result['name']}`",
            result["digests"]["base"][:12],
            result["digests"]["adapter"][:12],
            result["digests"]["vaccine"][:12],
            ", ".join(f"{name} {digest[:8]}" for name, digest in sorted(result["digests"].items()) if _is_rows(name)),
            result["created"],
        ]
        for result in results
    ]
    return "## Inputs\n\nSHA-256, shortened.\n\n" + _table(
        ["implant", "base", "adapter", "vaccine", "rows", "measured"], rows
    )


def _is_rows(name: str) -> bool:
    return name in ("calibration", "clean", "triggered", "benign")


def reading() -> str:
    """What the fields of a result file are."""
    return (
        "## The result files\n\n"
        "`python -m benchmarks.detection` writes one JSON file per adapter. `signals.NAME`, `fused` and "
        "`fused_attention_only` hold `auroc`, `tpr` and `fpr` (each `value`, `low`, `high`, `n`), `median_step`, "
        "`before_first_token` and `localised` (`fused` also `localised_by_removal`). `ablation` is the fused test "
        "without one signal, `roc` the curves. "
        "`uniformity` has the Kolmogorov-Smirnov tests and 99 % intervals of the promise. `controls` and `others` hold "
        "the flagged shares of requests that should not be flagged, with the `limit` they are judged by (`null`: "
        "reported only). `paper` has the paper's statistics over generated rows and over the last prompt row. `target` "
        "is how often the attacker's text was said, `trigger` what the triggered rows have in common, `digests`, `n`, "
        "`settings` and `vaccine` what went in."
    )
