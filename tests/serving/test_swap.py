"""Swapping revisions under traffic, back again, and over restarts; on the databases there are."""

from __future__ import annotations

import threading

import pytest

ASK = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog and then some more words"}]


def ready(house, weights, which):
    """Upload and calibrate one of the two adapters."""
    revision = house.upload("support", getattr(weights, which))["revision"]
    house.calibrate(revision, weights.profiles[which])
    return revision


def swap(house, revision, **more):
    return house.call("operator", "POST", "/admin/adapters/support/swap", json={"revision": revision, **more})


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("mode", ["block", "reroute"])
def test_a_swap_under_traffic_fails_no_request_and_mixes_no_answer(live, weights, mode, streaming):
    live.policy("support", mode=mode, alpha=0.05)
    first = live.gateway.aliases.route("support").revision
    second = ready(live, weights, "second")
    client, answers, problems, stop = live.openai(), [], [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = client.chat.completions.create(model="support", messages=ASK, max_tokens=6, stream=streaming)
                chunks = list(answer) if streaming else [answer]
                answers.append(({chunk.model for chunk in chunks}, chunks[-1].guard["revision"]))
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(answers) < 10:
        stop.wait(0.01)
    report = swap(live, second).json()
    after = len(answers)
    while len(answers) < after + 10:
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(models == {revision} for models, revision in answers)
    answered = {revision for _, revision in answers}
    assert answered == {first, second} if mode == "block" else answered <= {first, second, "base"}
    assert report["drained"]
    assert report["probe"]["status"] in ("clean", "flagged")
    assert live.ok("operator", "POST", "/admin/adapters/support/rollback")["revision"] == first
    assert live.gateway.aliases.route("support").revision == first


def test_only_a_calibrated_revision_goes_live_unless_the_operator_says_so_in_the_audit(live, weights):
    second = live.upload("support", weights.second)["revision"]
    assert swap(live, second).json()["error"]["code"] == "not_calibrated"
    assert swap(live, second, allow_uncalibrated=True).status_code == 200
    assert live.call(None, "GET", "/ready").status_code == 503
    last = live.ok("viewer", "GET", "/admin/audit")["rows"][-1]
    assert last["action"] == "adapter.swapped"
    assert last["detail"]["allow_uncalibrated"] is True


def test_a_second_swap_of_the_same_name_is_refused(live, weights):
    second = ready(live, weights, "second")
    live.gateway.swapper._busy.add("support")
    assert swap(live, second).json()["error"]["code"] == "swap_in_progress"


def test_a_revision_whose_files_were_changed_does_not_go_live(live, weights):
    second = ready(live, weights, "second")
    path = live.gateway.settings.state_dir / "adapters" / second / "adapter_config.json"
    path.chmod(0o644)
    path.write_text(path.read_text() + " ")
    assert "changed" in swap(live, second).json()["error"]["message"]


def test_uploading_the_same_files_again_gives_the_same_revision(live, weights):
    again = live.call("operator", "POST", "/admin/adapters/support/revisions", files=[
        ("files", (path.name, path.read_bytes())) for path in sorted(weights.first.iterdir())
    ])  # fmt: skip
    assert again.status_code == 200
    assert again.json()["revision"] == live.gateway.aliases.route("support").revision


def test_a_live_revision_is_not_retired_and_a_retired_one_not_swapped_in(live, weights):
    first, second = live.gateway.aliases.route("support").revision, ready(live, weights, "second")
    assert live.call("operator", "POST", f"/admin/revisions/{first}/retire").status_code == 409
    live.ok("operator", "POST", f"/admin/revisions/{second}/retire")
    assert "retired" in swap(live, second).json()["error"]["message"]


def test_what_was_live_is_live_again_after_a_restart_of_gateway_and_engine(live, open_gateway, engine):
    first = live.gateway.aliases.route("support").revision
    engine.unload(first, 5.0)
    again = open_gateway()
    again.keys = live.keys
    answer = again.openai().chat.completions.create(model="support", messages=ASK, max_tokens=2)
    assert answer.model == first
    assert answer.guard["status"] != "unscored"
    assert again.call(None, "GET", "/ready").json() == {"ready": True, "reasons": []}


@pytest.mark.parametrize("model", ["support", "base"])
def test_the_base_and_the_adapters_are_listed(live, model):
    assert model in [m.id for m in live.openai().models.list()]
    assert live.openai().models.retrieve(model).id == model
