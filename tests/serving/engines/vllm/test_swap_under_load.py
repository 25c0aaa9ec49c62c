"""Revisions are swapped while hundreds of requests run: none fails, and each is answered by one revision alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter

import httpx
import pytest

from tests.serving.engines.vllm.conftest import admit, go_live

pytestmark = pytest.mark.slow
SWAPS, AT_SWAP, AT_ONCE = 5, 100, 140
# Some share a beginning that is longer than a block of the key/value cache (128 tokens on a CPU).
SHARED = " ".join(f"w{(5 * i * i + i) % 54}" for i in range(140))
PROMPTS = [f"{SHARED} w{i} w{i + 1}" for i in range(3)] + [
    " ".join(f"w{(i + 7 * j) % 54}" for j in range(20 + i)) for i in range(5)
]


def body_of(model, prompt, **more):
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": 10, "temperature": 0, **more}


async def alone(served, adapters, names, prompts=PROMPTS):
    """What each revision answers to each prompt with nothing else running, nothing cached for it."""
    client = served.client()
    salts = itertools.count()
    told = {}
    for name in names:
        revision = adapters.revision(name)
        await client.load(revision, str(adapters.folders[name]))
        for prompt in prompts:
            answer = await client.complete(
                "/v1/chat/completions", body_of(revision, prompt, cache_salt=f"alone {next(salts)}")
            )
            told[revision, prompt] = answer["choices"][0]["message"]["content"]
    await client.aclose()
    return told


async def ask(http, prompt, stream):
    """(revision, prompt, text) of one answer; asserts that it came whole."""
    body = body_of("support", prompt, stream=stream)
    if not stream:
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["choices"][0]["finish_reason"] == "length"
        return answer["guard"]["revision"], prompt, answer["choices"][0]["message"]["content"]
    text, last = "", None
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
                assert "error" not in last, line
                text += last["choices"][0]["delta"].get("content") or ""
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["model"] == last["guard"]["revision"]
    return last["guard"]["revision"], prompt, text


async def load_and_swap(house, revisions):
    """Answers given while `support` was swapped, and how many requests were in flight at each swap."""
    kinds = itertools.cycle(itertools.product(PROMPTS, (True, False)))
    answers, at_swap, over = [], [], asyncio.Event()
    # A connection each: a kept one may be closed by the server at the very moment when it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    keys = {role: {"authorization": f"Bearer {house.keys[role]}"} for role in ("client", "operator")}
    async with (
        httpx.AsyncClient(base_url=house.url, headers=keys["client"], timeout=120, limits=limits) as http,
        httpx.AsyncClient(base_url=house.url, headers=keys["operator"], timeout=120) as operator,
    ):

        async def client():
            while not over.is_set():
                answers.append(await ask(http, *next(kinds)))

        clients = [asyncio.create_task(client()) for _ in range(AT_ONCE)]
        for revision in itertools.islice(itertools.cycle(revisions), SWAPS):
            while house.gateway.in_flight.requests < AT_SWAP:
                await asyncio.sleep(0.005)
            at_swap.append(house.gateway.in_flight.requests)
            swapped = await operator.post("/admin/adapters/support/swap", json={"revision": revision})
            assert swapped.status_code == 200, swapped.text
        over.set()
        await asyncio.gather(*clients)
    return answers, at_swap


def probe_of(served):
    headers = {"authorization": f"Bearer {served.key}"}
    return httpx.get(f"{served.url}/guard/status", headers=headers).json()["probe"]


def test_no_request_fails_or_is_answered_by_two_revisions_while_revisions_are_swapped(open_gateway, served, adapters):
    told = asyncio.run(alone(served, adapters, ("first", "second", "third")))
    blind = probe_of(served)["blind"]
    house = open_gateway(max_concurrent_requests=1000)
    revisions = [go_live(house, adapters, "first")]
    revisions += [admit(house, adapters, name) for name in ("second", "third")]
    answers, at_swap = asyncio.run(load_and_swap(house, [*revisions[1:], revisions[0]]))
    assert sum(at_swap) >= 500
    wrong = [(revision, prompt) for revision, prompt, text in answers if text != told[revision, prompt]]
    assert not wrong
    assert set(Counter(revision for revision, _, _ in answers)) == set(revisions)
    assert len({told[revision, PROMPTS[0]] for revision in revisions}) == 3
    assert probe_of(served)["attached"]
    assert probe_of(served)["blind"] == blind


def test_a_prefix_cached_under_the_old_revision_never_reaches_the_new_one(live, served, adapters):
    words = random.Random()  # not seeded: nobody has asked this before, so nothing of it is cached
    prompt = " ".join(f"w{words.randrange(54)}" for _ in range(200))
    told = asyncio.run(alone(served, adapters, ("first", "second"), [prompt]))

    def asked():
        response = live.call("client", "POST", "/v1/chat/completions", json=body_of("support", prompt))
        return response.json()["choices"][0]["message"]["content"]

    def hits():
        metrics = httpx.get(f"{served.url}/metrics").text
        return sum(float(m.split()[-1]) for m in metrics.splitlines() if m.startswith("vllm:prefix_cache_hits_total"))

    first, second = adapters.revision("first"), admit(live, adapters, "second")
    before = hits()
    assert [asked(), asked()] == [told[first, prompt]] * 2
    cached = hits()
    assert cached > before, "the prompt was not cached at all: this test shows nothing"
    live.ok("operator", "POST", "/admin/adapters/support/swap", json={"revision": second})
    assert asked() == told[second, prompt] != told[first, prompt]
    assert hits() == cached
    live.ok("operator", "POST", "/admin/adapters/support/rollback")
    assert asked() == told[first, prompt]
