"""Several gateways over one database, and an engine that comes back with nothing in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from serving.engines.client import EngineClient
from serving.engines.embedded.app import create_engine_app
from serving.engines.embedded.engine import EmbeddedEngine
from serving.engines.pool import EnginePool
from serving.engines.transport import InProcessTransport
from serving.restore import Leftovers
from tests.serving.house import open_house

ASK = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog and then some more words"}]


def ask(house, model="support"):
    body = {"model": model, "messages": ASK, "max_tokens": 4, "temperature": 0}
    return house.call("client", "POST", "/v1/chat/completions", json=body)


def scored(answer):
    return answer.json()["guard"]["status"] in ("clean", "flagged")


def admit(house, weights, which):
    revision = house.upload("support", getattr(weights, which))["revision"]
    house.calibrate(revision, weights.profiles[which])
    return revision


def swap(house, revision):
    return house.ok("operator", "POST", "/admin/adapters/support/swap", json={"revision": revision})


@pytest.fixture
def live_twice(live, open_gateway, weights):
    """Two gateways over one database and engine; the first made ``support`` live."""
    return live, open_gateway()


def test_a_swap_by_one_gateway_is_noticed_by_the_other_without_being_told(live_twice, weights):
    one, other = live_twice
    first = ask(other).json()["guard"]["revision"]
    second = admit(one, weights, "second")
    swap(one, second)
    assert ask(one).json()["guard"]["revision"] == second != first
    while ask(other).json()["guard"]["revision"] != second:
        pass
    assert other.call(None, "GET", "/ready").status_code == 200


def test_a_request_sent_to_a_revision_that_was_unloaded_meanwhile_is_asked_again_of_the_new_one(
    live_twice, engine, weights
):
    one, other = live_twice
    stale = other.gateway.aliases.route("support")
    second = admit(one, weights, "second")
    swap(one, second)
    engine.unload(stale.revision)
    # As if the swap had been noticed by nobody yet: the other gateway still has the old table.
    other.gateway.aliases._routes = {**other.gateway.aliases._routes, "support": stale}
    answer = ask(other)
    assert answer.status_code == 200
    assert answer.json()["guard"]["revision"] == second
    assert 'phase="lost"' not in other.call(None, "GET", "/metrics").text


def test_a_revision_that_the_engine_lost_is_503_counted_and_loaded_again(live, engine):
    revision = ask(live).json()["guard"]["revision"]
    engine.unload(revision)
    assert "not loaded" in live.call(None, "GET", "/ready").text
    answer = ask(live)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert 'guard_engine_errors_total{phase="lost"} 1.0' in live.call(None, "GET", "/metrics").text
    while live.call(None, "GET", "/ready").status_code != 200:
        pass
    assert scored(ask(live))


def test_another_profile_than_the_attached_one_is_not_ready_and_is_put_right(live, engine, weights):
    revision = ask(live).json()["guard"]["revision"]
    engine.books.set_profile(revision, None)
    assert "no matching profile" in live.call(None, "GET", "/ready").text
    while live.call(None, "GET", "/ready").status_code != 200:
        pass
    assert engine.books.entry(revision)["profile"]


@pytest.fixture
def engines(weights) -> Iterator[list[EmbeddedEngine]]:
    engines = [EmbeddedEngine(weights.base, "base", max_slots=4).start() for _ in range(2)]
    yield engines
    for engine in engines:
        engine.close()


def test_a_swap_reaches_every_engine_and_is_refused_when_one_of_them_is_away(engines, settings, weights):
    with ExitStack() as stack:
        clients = [EngineClient(transport=InProcessTransport(create_engine_app(engine))) for engine in engines]
        house = stack.enter_context(open_house(settings, EnginePool(clients)))
        first = admit(house, weights, "first")
        house.policy("support", alpha=0.05)
        swap(house, first)
        assert [first in engine.books for engine in engines] == [True, True]
        before = [engine.steps for engine in engines]
        assert all(scored(ask(house)) for _ in range(4))
        assert all(engine.steps > steps for engine, steps in zip(engines, before, strict=True))
        second = admit(house, weights, "second")
        engines[1].close()
        refused = house.call("operator", "POST", "/admin/adapters/support/swap", json={"revision": second})
        assert refused.status_code == 503
        assert ask(house).json()["guard"]["revision"] == first


async def test_what_nobody_wants_is_unloaded_after_a_while_and_nothing_else(live, engine, weights):
    second = weights.revision("second")
    engine.load(second, weights.second)
    wanted = live.gateway.aliases.route("support").revision
    client = EngineClient(transport=InProcessTransport(create_engine_app(engine)))
    leftovers = Leftovers(looks=3)
    swept = [await leftovers.sweep(live.gateway.store, client) for _ in range(3)]
    assert swept == [[], [], [second]]
    assert second not in engine.books
    assert wanted in engine.books
    assert await asyncio.wait_for(leftovers.sweep(live.gateway.store, client), 10) == []
    await client.aclose()
