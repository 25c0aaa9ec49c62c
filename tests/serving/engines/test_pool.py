"""Several engines as one: turns, what holds for all, and engines that are away."""

from __future__ import annotations

import httpx
import pytest

from serving.engines.client import EngineClient, EngineError, EngineUnavailable
from serving.engines.pool import EnginePool, together
from serving.engines.transport import InProcessTransport
from tests.serving.scripted import DONE, ROLE, ScriptedPeer, finish, tokens, whole

CHAT = "/v1/chat/completions"


class Away(httpx.AsyncBaseTransport):
    """A host where nobody listens."""

    async def handle_async_request(self, request):
        raise httpx.ConnectError("refused", request=request)


def engine(name, **peer):
    answers = {"m": whole(name, None)}
    streams = {"m": [ROLE, *tokens(1, 2), finish(), DONE]}
    return ScriptedPeer(answers=answers, streams=streams, **{"revisions": {"m": "p"}, **peer})


def client_of(peer, url="http://engine"):
    return EngineClient(url, transport=InProcessTransport(peer) if peer is not None else Away())


def pool_of(*peers):
    return EnginePool([client_of(peer, f"http://e{i}") for i, peer in enumerate(peers)])


async def said(pool):
    return (await pool.complete(CHAT, {"model": "m"}))["choices"][0]["message"]["content"]


async def heard(pool):
    return [event async for event in pool.stream(CHAT, {"model": "m", "stream": True})]


async def test_requests_take_turns_streams_included():
    one, two = engine("one"), engine("two")
    pool = pool_of(one, two)
    assert {await said(pool) for _ in range(4)} == {"one", "two"}
    assert (len(one.seen), len(two.seen)) == (2, 2)
    assert [len(await heard(pool)) for _ in range(2)] == [5, 5]
    assert (len(one.seen), len(two.seen)) == (3, 3)


async def test_an_engine_that_is_away_costs_no_request_and_is_asked_again_when_it_is_back():
    two = engine("two")
    pool = pool_of(None, two)
    assert [await said(pool) for _ in range(4)] == ["two"] * 4
    assert len(await heard(pool)) == 5
    status = await pool.status()
    assert status["probe"]["attached"] is False
    assert "http://e0 does not answer" in status["probe"]["reason"]
    back = engine("back")
    pool.members[0]._http._transport = InProcessTransport(back)
    assert (await pool.status())["probe"]["attached"] is True
    assert {await said(pool) for _ in range(2)} == {"back", "two"}


async def test_an_engine_that_lost_a_revision_is_left_out_until_it_has_it_again():
    lost, kept = engine("lost", revisions={}), engine("kept")
    pool = pool_of(lost, kept)
    assert [e["revision"] for e in (await pool.status())["revisions"]] == ["base"]
    assert [await said(pool) for _ in range(4)] == ["kept"] * 4
    await pool.load("m", "/folder", "p")
    assert [e["revision"] for e in (await pool.status())["revisions"]] == ["base", "m"]
    assert {await said(pool) for _ in range(2)} == {"lost", "kept"}


async def test_nobody_there_is_unavailable():
    pool = pool_of(None, None)
    for call in (pool.status(), pool.load("m", "/x"), said(pool), heard(pool)):
        with pytest.raises(EngineUnavailable):
            await call


async def test_a_load_that_fails_somewhere_fails():
    pool = pool_of(engine("one"), None)
    with pytest.raises(EngineError):
        await pool.load("n", "/folder")


def status(**changes):
    probe = {"attached": True, "blind": 0, "key": {"kernel": "k"}}
    base = {"revision": "base", "profile": None, "reason": "no_profile", "in_flight": 1}
    mine = {"revision": "m", "profile": "p", "reason": None, "in_flight": 2}
    told = {"engine": "vllm", "version": "1", "base": {"name": "base", "digest": "0"}, "dtype": "float32",
            "max_model_len": 64, "probe": probe, "steps": 1, "running": 1, "waiting": 0, "slots": 8,
            "revisions": [base, mine]}  # fmt: skip
    return {**told, **changes}


def test_what_is_said_of_several_engines_holds_for_each():
    one = status()
    assert together([one]) is one
    both = together([one, status(max_model_len=32)])
    assert both["max_model_len"] == 32
    assert both["running"] == 2
    assert both["probe"]["attached"]
    assert both["revisions"][1] == {"revision": "m", "profile": "p", "reason": None, "in_flight": 4}
    other = {"revision": "m", "profile": "q", "reason": None, "in_flight": 0}
    assert (
        together([one, status(revisions=[one["revisions"][0], other])])["revisions"][1]["reason"] == "profiles_differ"
    )
    blind = {"attached": False, "reason": "probe_detached", "key": {"kernel": "k"}}
    assert together([one, status(probe=blind)])["probe"]["reason"] == "probe_detached"
    for change in ({"dtype": "bfloat16"}, {"base": {"name": "base", "digest": "1"}}):
        assert together([one, status(**change)])["probe"]["attached"] is False
