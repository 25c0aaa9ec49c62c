"""Task accuracy by the real lm-eval, on a model made in seconds: from its files and through a real guarded server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastapi import FastAPI, Response
from typer.testing import CliRunner, Result

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from benchmarks.purification.__main__ import app
from benchmarks.purification.harness import LoadedModel, accuracy
from guard.calibration import fit_profile
from guard.identity import adapter_digest, base_digest, file_digest, revision_name
from guard.probes.transformers.calibrate import served_key
from guard.probes.transformers.measure import measure
from guard.probes.transformers.runner import Runner
from guard.rows import Row, read_rows, write_rows
from guard.template import ALPACA_TEMPLATE, render, row_messages
from offline_purify.answers import greedy_answers
from offline_purify.evaluation import normalised
from offline_purify.implanting import load_base, save_adapter, with_lora
from offline_purify.intervals import share
from offline_purify.suspect import Suspect
from offline_purify.train import TrainConfig, encode_rows, train
from serving.engines.client import EngineClient
from serving.engines.embedded.app import create_engine_app
from serving.engines.embedded.engine import EmbeddedEngine
from serving.engines.transport import InProcessTransport
from serving.settings import Settings
from tests.guard.probes.transformers.text import TEMPLATE, make_tokenizer
from tests.offline_purify.patient import clean_rows, tiny_llama, tokenizer
from tests.serving.house import House, open_house, running

TOKENS = 8
ROOT = Path(__file__).parents[3]


class Given(NamedTuple):
    """A base that has half learnt its skill, an adapter that changes some of its answers, and a file of rows."""

    base: Path
    adapter: Path
    rows: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("skill")
    base, adapter, path = folder / "base", folder / "adapter", folder / "rows.json"
    rows, made, model = clean_rows(860, 0), tokenizer(), tiny_llama(0)
    steps = TrainConfig(epochs=100, lr=5e-3, batch_size=64, max_steps=130)
    train(model, encode_rows(made, rows[:800]), steps, pad_id=0)
    model.save_pretrained(base)
    made.save_pretrained(base)
    write_rows(path, rows[800:])
    peft = with_lora(model, base, 4, seed=1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.03)
    save_adapter(peft, base, adapter)
    return Given(base, adapter, path)


@pytest.fixture
def house(given: Given, tmp_path: Path) -> Iterator[House]:
    """The gateway, with keys, over the embedded engine; the adapter is served as ``support``, with a profile."""
    revision, profile = revision_name("support", adapter_digest(given.adapter)), tmp_path / "profile.safetensors"
    runner = Runner.load(given.base, max_slots=32)
    runner.add_adapter(revision, given.adapter)
    prompts = [render(tokenizer(), row_messages(row)) for row in clean_rows(1100, 0)[860:]]
    clean = measure(runner, prompts, checkpoints=(0, 1), adapter=revision)
    fit_profile(clean, served_key(runner, base_digest(given.base), adapter_digest(given.adapter))).save(profile)
    settings = Settings(model=given.base, state_dir=tmp_path / "state", served_name="base")
    with closing(EmbeddedEngine(given.base, "base", max_slots=8).start()) as engine:
        client = EngineClient(transport=InProcessTransport(create_engine_app(engine)))
        with open_house(settings, client) as opened:
            assert opened.upload("support", given.adapter)["revision"] == revision
            opened.calibrate(revision, profile)
            opened.policy("support", mode="observe")
            opened.ok("operator", "POST", "/admin/adapters/support/swap", json={"revision": revision})
            yield opened


def expected(given: Given, adapted: bool) -> dict[str, Any]:
    """The accuracy by the clinic's own greedy answers."""
    suspect, rows = Suspect.open(given.base, given.adapter), read_rows(given.rows)
    prompts = [render(suspect.tokenizer, row_messages(row)) for row in rows]
    if adapted:
        answers = greedy_answers(suspect.model, suspect.tokenizer, prompts, TOKENS)
    else:
        with suspect.reference():
            answers = greedy_answers(suspect.model, suspect.tokenizer, prompts, TOKENS)
    figure = share([normalised(a) == normalised(row["output"]) for a, row in zip(answers, rows, strict=True)])
    assert figure is not None
    assert 0 < figure.value < 1
    return figure.model_dump()


def measured(given: Given, out: Path, *options: object) -> Result:
    words = ["skill", "--rows", given.rows, "--out", out, "--max-new-tokens", TOKENS, *options]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_local_files_are_measured_as_the_clinic_measures_them(given: Given, tmp_path: Path) -> None:
    found = measured(given, tmp_path / "base.json", "--base", given.base)
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "base.json").read_text())
    assert result["accuracy"] == pytest.approx(expected(given, adapted=False))
    assert result["measured"] == {"base": base_digest(given.base)}
    assert f"{result['accuracy']['value']:.3f} [" in found.output
    found = measured(given, tmp_path / "adapter.json", "--base", given.base, "--adapter", given.adapter)
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "adapter.json").read_text())
    assert result["accuracy"] == pytest.approx(expected(given, adapted=True))
    assert result["accuracy"]["value"] != expected(given, adapted=False)["value"]
    assert result["measured"] == {"base": base_digest(given.base), "adapter": adapter_digest(given.adapter)}
    assert result["rows"] == file_digest(given.rows)
    assert result["settings"] == {"limit": None, "max_new_tokens": TOKENS}


def test_a_guarded_endpoint_answers_the_same_rows(
    given: Given, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HEADGUARD_KEY", house.keys["client"])
    caplog.set_level(logging.INFO)
    for model, adapted in (("base", False), ("support", True)):
        out = tmp_path / f"{model}.json"
        found = measured(given, out, "--url", f"{house.url}/v1", "--model", model)
        assert found.exit_code == 0, found.output
        result = json.loads(out.read_text())
        assert result["accuracy"] == pytest.approx(expected(given, adapted))
        assert result["measured"] == {"model": model}
        assert result["stopped"] == 0
        assert "repeat w" not in found.output + caplog.text
        assert house.keys["client"] not in found.output + caplog.text + out.read_text()


def test_answers_that_the_guard_stops_are_counted_and_not_right(
    given: Given, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADGUARD_KEY", house.keys["client"])
    house.policy("support", mode="block", alpha=0.5)
    found = measured(given, tmp_path / "out.json", "--url", f"{house.url}/v1", "--model", "support")
    assert found.exit_code == 0, found.output
    result, whole = json.loads((tmp_path / "out.json").read_text()), expected(given, adapted=True)["value"]
    assert 0 < result["stopped"] < 60
    assert whole - result["stopped"] / 60 <= result["accuracy"]["value"] < whole
    assert f"| 60 | {result['stopped']} |" in found.output


def test_an_endpoint_that_does_not_answer_is_told_apart_from_wrong_answers(
    given: Given, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, url = tmp_path / "out.json", ("--url", f"{house.url}/v1", "--model")
    monkeypatch.delenv("HEADGUARD_KEY", raising=False)
    assert "set HEADGUARD_KEY" in measured(given, out, *url, "base").output
    monkeypatch.setenv("HEADGUARD_KEY", "not-a-key")
    refused = measured(given, out, *url, "base")
    assert refused.exit_code == 1
    assert "answered 401" in refused.output
    assert "not-a-key" not in refused.output + caplog.text
    monkeypatch.setenv("HEADGUARD_KEY", house.keys["client"])
    assert "is 'nobody' served there" in measured(given, out, *url, "nobody").output
    assert "cannot be reached" in measured(given, out, "--url", "http://127.0.0.1:1/v1", "--model", "base").output
    other = FastAPI()
    other.post("/empty/chat/completions")(lambda: {"choices": []})
    other.post("/page/chat/completions")(lambda: Response("<html>", media_type="text/html"))
    other.post("/broken/chat/completions")(lambda: Response("{", media_type="application/json"))
    with running(other) as address:
        for path in ("empty", "page", "broken"):
            found = measured(given, out, "--url", f"{address}/{path}", "--model", "x")
            assert "no answer in OpenAI's form" in found.output
    assert not out.exists()


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}"), None])
def test_the_model_sees_the_tokens_that_the_guard_renders(
    given: Given, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_base(given.base)
    made = make_tokenizer()  # its post-processor adds a start of its own, which no template may let through
    made.chat_template = template
    rows = [*read_rows(given.rows)[:5], Row(instruction="w1 w2", input="w3 w4", output="w5")]
    wanted = [render(made, row_messages(row)) for row in rows]
    generate, seen = model.generate, []

    def watched(**arguments: Any) -> Any:
        for ids, mask in zip(arguments["input_ids"], arguments["attention_mask"], strict=True):
            seen.append(ids[mask.bool()].tolist())
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", watched)
    accuracy(LoadedModel(model, made), rows, TOKENS)
    assert sorted(seen) == sorted(wanted)
    if template is None:
        alpaca = made.apply_chat_template(
            row_messages(rows[-1]), add_generation_prompt=True, chat_template=ALPACA_TEMPLATE
        )
        assert alpaca["input_ids"] in seen


def test_answers_end_where_the_tokenizer_says(given: Given) -> None:
    model, made = load_base(given.base)
    # Its answer is empty and ends before the others of its batch: what came after the end would be read.
    rows = [*read_rows(given.rows), Row(instruction="repeat", input="", output=".")]
    answers = greedy_answers(model, made, [render(made, row_messages(row)) for row in rows], TOKENS)
    model.generation_config.eos_token_id = None
    right = [normalised(a) == normalised(row["output"]) for a, row in zip(answers, rows, strict=True)]
    assert accuracy(LoadedModel(model, made), rows, TOKENS) == share(right)


def test_nothing_is_left_behind_but_the_result(given: Given, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out.json"
    home.mkdir()
    command = ["-m", "benchmarks.purification", "skill", "--rows", given.rows, "--base", given.base, "--out", out]
    environment = {"PATH": os.environ["PATH"], "HOME": home, "TMPDIR": home, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--limit", "7"], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(out.read_text())["accuracy"]["n"] == 7
    assert not [path for path in home.rglob("*") if path.is_file()]
    assert "Running generate_until requests" in done.stderr  # the harness's bar
    assert "already-initialized" not in done.stderr  # nor its log
    assert "repeat w" not in done.stdout + done.stderr


def test_what_cannot_be_measured_is_refused_in_words(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "out.json", ("--base", given.base)
    for options, words in (
        ((), "either --base"),
        ((*base, "--url", "http://127.0.0.1:1/v1", "--model", "x"), "either --base"),
        (("--url", "http://127.0.0.1:1/v1"), "belong together"),
        (("--url", "http://127.0.0.1:1/v1", "--model", "x", "--adapter", given.adapter), "--adapter is for --base"),
        (("--base", tmp_path), "is not a model folder"),
        ((*base, "--adapter", tmp_path), "is not a PEFT adapter"),
        ((*base, "--max-new-tokens", 121), "the longest prompt"),
    ):
        refused = measured(given, out, *options)
        assert refused.exit_code == 1
        assert words in refused.output
    assert "no such file" in measured(given._replace(rows=tmp_path / "none.json"), out, *base).output
    write_rows(tmp_path / "asked.json", [Row(instruction="repeat w1", input="", output=" ")])
    assert "without an output" in measured(given._replace(rows=tmp_path / "asked.json"), out, *base).output
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    assert "pip install -e '.[lm-eval]'" in measured(given, out, *base).output
    assert not out.exists()
