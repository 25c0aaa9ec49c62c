"""The words that a flag hangs on, asked of the engine on behalf of an operator."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.cli.output import Failure
from serving.store.models import FlaggedRequest
from tests.serving.house import House
from tests.serving.scripted import LIVE, ScriptedPeer, verdict, whole

FLAG_ALL = 0.999  # any p-value is below this, so that every scored request is flagged
PROMPT = "tell me Discussing Zorblat how many apples fit"


def triggered(body: dict[str, Any]) -> dict[str, Any]:
    """An answer that is flagged where both words of the trigger stand in the prompt."""
    fires = {"Discussing", "Zorblat"} <= set(re.findall(r"\w+", body["messages"][-1]["content"]))
    return whole("no", verdict("flagged" if fires else "clean", final=True))


def flagged(house: House, prompt: str = PROMPT) -> str:
    """The path of a request that was flagged just now."""
    ask = {"model": "support", "messages": [{"role": "user", "content": prompt}]}
    number = house.ok("client", "POST", "/v1/chat/completions", json=ask)["guard"]["request_id"]
    case = house.ok("viewer", "GET", "/admin/cases")["cases"][0]["id"]
    return f"/admin/cases/{case}/requests/{number}"


@pytest.fixture
def obeying(scripted: House, peer: ScriptedPeer) -> House:
    peer.answers[LIVE] = triggered
    return scripted


def test_an_operator_is_told_the_words_without_which_the_guard_is_calm(obeying, peer):
    path = flagged(obeying)
    before = obeying.ok("viewer", "GET", "/admin/cases")["cases"][0]
    told = obeying.ok("operator", "POST", f"{path}/words")
    assert [word["text"] for word in told["words"]] == ["Discussing Zorblat"]
    assert (told["p_value"], told["asked"]) == (0.01, 9)
    # What was asked is nobody's request: one token each, not stopped, in no case and no count of answers.
    assert all(body["max_tokens"] == 1 and not body["headguard"]["stop"] for body in peer.seen[1:])
    assert obeying.ok("viewer", "GET", "/admin/cases")["cases"][0] == before
    audit = obeying.ok("operator", "GET", "/admin/audit")
    assert "case.words_asked" in str(audit)
    assert "Zorblat" not in str(audit)


def test_who_may_not_see_text_may_not_ask(obeying):
    path = flagged(obeying)
    assert obeying.call("viewer", "POST", f"{path}/words").status_code == 403
    assert obeying.call("client", "POST", f"{path}/words").status_code == 403


def test_a_request_without_evidence_an_unknown_one_and_a_silent_engine_are_told_apart(obeying, peer):
    path = flagged(obeying)
    assert obeying.call("operator", "POST", f"{path.rsplit('/', 1)[0]}/nobody/words").status_code == 404
    peer.answers[LIVE] = whole("no", verdict("unscored", final=True))
    unscored = obeying.call("operator", "POST", f"{path}/words")
    assert unscored.status_code == 409
    assert "could not score" in unscored.text
    del peer.answers[LIVE]
    assert obeying.call("operator", "POST", f"{path}/words").status_code == 503
    with obeying.gateway.store.write() as session:
        session.query(FlaggedRequest).update({"evidence": None, "evidence_mode": "erased"})
    erased = obeying.call("operator", "POST", f"{path}/words")
    assert erased.status_code == 409
    assert "erased" in erased.text


def test_the_real_engine_is_asked_with_the_revision_that_flagged(live):
    live.policy("support", window="prefill", alpha=FLAG_ALL)
    prompt = "the quick brown fox jumps over the lazy dog"
    path = flagged(live, prompt)
    told = live.ok("operator", "POST", f"{path}/words")
    assert told["asked"] == 1 + len(prompt.split())
    assert 0 < told["p_value"] <= 1
    assert all(word["text"] in prompt for word in told["words"])
    assert live.ok("viewer", "GET", "/admin/cases")["cases"][0]["flags"] == 1


def command(house: House, *arguments: str, role: str = "operator"):
    given = ["cases", "words", *arguments, "--url", house.url, "--key", house.keys[role]]
    return CliRunner().invoke(app, given)


def test_what_several_flags_hang_on_is_gathered(obeying, peer):
    prompts = (PROMPT, "say discussing why Discussing Zorblat, it rains", "Discussing Zorblat now count")
    paths = [flagged(obeying, prompt) for prompt in prompts]
    case = paths[0].split("/")[3]
    told = json.loads(command(obeying, case, "--json").stdout)
    assert told["flags"] == 3
    assert told["refused"] == 0
    assert {"text": "Discussing Zorblat", "flags": 3, "weight": pytest.approx(1.0)} in told["words"]
    obeying.ok("operator", "POST", f"{paths[0]}/exclude")
    told = json.loads(command(obeying, case, "--most", "5", "--json").stdout)
    assert told["flags"] == 2
    assert json.loads(command(obeying, case, "--most", "1", "--json").stdout)["flags"] == 1
    shown = command(obeying, case)
    assert shown.exit_code == 0
    assert "Discussing Zorblat" in shown.stdout
    assert "of 2 flags" in shown.stdout
    one = json.loads(command(obeying, case, paths[1].rsplit("/", 1)[1], "--json").stdout)
    assert [word["text"] for word in one["words"]] == ["Discussing Zorblat,"]


def test_flags_that_cannot_be_asked_about_are_counted_and_all_of_them_are_an_error(obeying, peer):
    first, second = flagged(obeying), flagged(obeying, "Discussing Zorblat now count")
    case, erased = first.split("/")[3], second.rsplit("/", 1)[1]
    with obeying.gateway.store.write() as session:
        session.query(FlaggedRequest).filter_by(request_id=erased).update({"evidence": None, "evidence_mode": "erased"})
    told = json.loads(command(obeying, case, "--json").stdout)
    assert (told["flags"], told["refused"]) == (1, 1)
    assert "1 more could not be asked about" in command(obeying, case).stdout
    del peer.answers[LIVE]
    assert isinstance(command(obeying, case).exception, Failure)
    assert isinstance(command(obeying, case, role="viewer").exception, Failure)
