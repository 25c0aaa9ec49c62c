"""The in-process transport behaves as a socket would: piece by piece, with backpressure, disconnects and errors."""

import asyncio

import httpx
import pytest

from serving.engines.client import EngineClient, EngineUnavailable
from serving.engines.transport import InProcessTransport


def http(app, **options):
    return httpx.AsyncClient(transport=InProcessTransport(app), base_url="http://app", **options)


async def start(send, status=200):
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-made-by", b"app")]})


async def test_method_path_query_headers_and_body_arrive_and_the_answer_returns():
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope, message=await receive())
        await start(send, 201)
        await send({"type": "http.response.body", "body": b"hello"})

    async with http(app) as client:
        response = await client.put("/a%20b/c@d?x=1", content=b"body", headers={"X-Some": "thing"})
    assert (response.status_code, response.content, response.headers["x-made-by"]) == (201, b"hello", "app")
    assert (seen["method"], seen["path"], seen["query_string"]) == ("PUT", "/a b/c@d", b"x=1")
    assert (b"x-some", b"thing") in seen["headers"]
    assert seen["message"] == {"type": "http.request", "body": b"body", "more_body": False}


async def test_pieces_are_read_before_the_app_sends_the_last_one():
    more = asyncio.Event()

    async def app(scope, receive, send):
        await start(send)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await more.wait()
        await send({"type": "http.response.body", "body": b"two"})

    async with http(app) as client, client.stream("GET", "/") as response:
        pieces = response.aiter_raw()
        assert await anext(pieces) == b"one"
        more.set()
        assert [piece async for piece in pieces] == [b"two"]


async def test_an_app_that_sends_faster_than_it_is_read_has_to_wait():
    sent = 0

    async def app(scope, receive, send):
        nonlocal sent
        await start(send)
        for _ in range(100):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1
        await send({"type": "http.response.body", "body": b""})

    async with http(app) as client, client.stream("GET", "/") as response:
        for _ in range(200):
            await asyncio.sleep(0)
        assert sent < 20
        assert len(await response.aread()) == 100


async def test_closing_early_delivers_a_disconnect_and_waits_for_the_app_to_be_over():
    heard = []

    async def app(scope, receive, send):
        await receive()
        await start(send)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        heard.append((await receive())["type"])
        await asyncio.sleep(0)
        heard.append("tidied")

    async with http(app) as client, client.stream("GET", "/") as response:
        await anext(response.aiter_raw())
    assert heard == ["http.disconnect", "tidied"]


async def test_an_app_blocked_on_a_reader_that_left_is_released():
    over = asyncio.Event()

    async def app(scope, receive, send):
        await start(send)
        for _ in range(100):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        over.set()

    async with http(app) as client, client.stream("GET", "/") as response:
        await anext(response.aiter_raw())
    assert over.is_set()


async def test_cancelling_the_request_before_it_was_answered_ends_the_app():
    started, ended = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        started.set()
        await receive()
        ended.set()

    async with http(app) as client:
        request = asyncio.create_task(client.get("/"))
        await started.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert ended.is_set()


async def test_an_app_that_raises_is_an_httpx_error_before_and_after_the_start():
    async def app(scope, receive, send):
        if scope["path"] == "/late":
            await start(send)
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
        raise LookupError("inner detail")

    async with http(app) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="raised LookupError") as error:
            await client.get("/early")
        assert "inner detail" not in str(error.value)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/late")
    engine = EngineClient(transport=InProcessTransport(app))
    with pytest.raises(EngineUnavailable):
        await engine.status()
    with pytest.raises(EngineUnavailable):
        [event async for event in engine.stream("/late", {})]


async def test_an_app_that_says_nothing_runs_into_the_read_timeout():
    async def app(scope, receive, send):
        await receive()
        await receive()

    async with http(app, timeout=0.05) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/")


async def test_an_app_that_returns_without_an_answer_is_an_error_and_not_a_hang():
    async def app(scope, receive, send):
        return None

    async with http(app) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="returned"):
            await client.get("/")
