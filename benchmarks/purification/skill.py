"""What a model can do, measured with lm-eval: exact match on rows, of a base with or without an adapter, or of whatever
an endpoint serves. The same rows before and after a repair tell what it cost."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from benchmarks.purification.errors import BenchmarkError
from guard.adapters import inspect_adapter
from guard.identity import base_digest
from guard.rows import Row, read_rows, row_key, rows_digest
from guard.template import render, row_messages
from offline_purify.implanting import load_base

if TYPE_CHECKING:
    from lm_eval.api.model import LM

FORMAT = "headguard.skill/1"
KEY = "HEADGUARD_KEY"


@dataclass(frozen=True)
class SkillArguments:
    """The options of a measurement: either a ``base`` folder, with or without an ``adapter``, or the ``url`` of an
    OpenAI-compatible server and the name of a ``model`` there; of ``rows`` the first ``limit``, or all."""

    rows: Path
    base: Path | None = None
    adapter: Path | None = None
    url: str | None = None
    model: str | None = None
    limit: int | None = None
    max_new_tokens: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.base is None) == (self.url is None):
            raise BenchmarkError("expected either --base (local files) or --url (a served endpoint).")
        if self.adapter is not None and self.base is None:
            raise BenchmarkError("--adapter is for --base: what an endpoint answers with is named by --model.")
        if (self.model is None) != (self.url is None):
            raise BenchmarkError("--url and --model belong together: the server, and the name of the model there.")


def measure_skill(given: SkillArguments) -> dict[str, Any]:
    """Accuracy with its interval, what was measured, and how; ``stopped`` is how many answers an endpoint's filter (the
    guard) stopped, None for local files.

    Raises GuardError for what is not there or cannot be used: the extra, the key, rows, models, an endpoint.
    """
    if find_spec("lm_eval") is None:
        raise BenchmarkError("lm-eval is not installed: run `pip install -e '.[lm-eval]'` in the project's folder.")
    rows = list({row_key(row): row for row in read_rows(given.rows)}.values())[: given.limit]
    if not all(row["output"].strip() for row in rows):
        raise BenchmarkError(f"{given.rows}: rows without an output; the right answers are needed.")
    from benchmarks.purification import harness

    with harness.silent():
        lm, measured = _served(given) if given.base is None else _loaded(given, given.base, rows)
        accuracy = harness.accuracy(lm, rows, given.max_new_tokens)
    return {
        "format": FORMAT,
        "accuracy": accuracy.model_dump(),
        "stopped": getattr(lm, "stopped", None),
        "measured": measured,
        "rows": rows_digest(given.rows),
        "lm_eval": harness.VERSION,
        "settings": {"limit": given.limit, "max_new_tokens": given.max_new_tokens},
    }


def skill_table(result: dict[str, Any]) -> str:
    """The figure as a Markdown table of one line."""
    figure = result["accuracy"]
    what = ", ".join(f"{kind} `{name if kind == 'model' else name[:12]}`" for kind, name in result["measured"].items())
    share = f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
    stopped = "–" if result["stopped"] is None else result["stopped"]
    cells = (what, share, figure["n"], stopped, result["lm_eval"])
    lines = (("measured", "accuracy", "rows", "stopped", "lm-eval"), ("---",) * len(cells), cells)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _served(given: SkillArguments) -> tuple[LM, dict[str, str]]:
    from benchmarks.purification.harness import Endpoint

    key = os.environ.get(KEY)
    if not key:
        raise BenchmarkError(f"no API key: set {KEY}; to an endpoint that wants none, any text.")
    assert given.url is not None
    assert given.model is not None
    return Endpoint(given.url, given.model, key), {"model": given.model}


def _loaded(given: SkillArguments, base: Path, rows: list[Row]) -> tuple[LM, dict[str, str]]:
    from benchmarks.purification.harness import LoadedModel

    if given.adapter is None:
        measured = {"base": base_digest(base)}
    else:
        info = inspect_adapter(given.adapter, base)
        measured = {"base": info.base_digest, "adapter": info.digest}
    model, tokenizer = load_base(base)
    if given.adapter is not None:
        model = PeftModel.from_pretrained(model, str(given.adapter)).eval()
    lm = LoadedModel(model.to(given.device), tokenizer)
    longest = max(len(render(tokenizer, row_messages(row))) for row in rows) + given.max_new_tokens
    if longest > lm.max_length:  # the harness would cut the prompt's beginning off
        raise BenchmarkError(
            f"{given.rows}: the longest prompt and --max-new-tokens take {longest} tokens; {base} has {lm.max_length}."
        )
    return lm, measured
