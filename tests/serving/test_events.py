"""Cutting an engine's bytes into events, however the network cuts them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.events import Annotation, Chunk, Done, StreamBroken, read_events
from tests.serving.scripted import DONE, ROLE, comment, finish, tokens, verdict

STREAM = b"".join([comment(verdict()), ROLE, *tokens(1, 3), comment(verdict(step=3, final=True)), finish(), DONE])


async def pieces(parts):
    for part in parts:
        yield part


async def read(parts):
    return [event async for event in read_events(pieces(parts))]


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
async def test_events_do_not_depend_on_where_the_network_cuts(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    events = await read([STREAM[a:b] for a, b in pairwise(edges)])
    kinds = [type(event) for event in events]
    assert kinds == [Annotation, Chunk, Chunk, Chunk, Chunk, Annotation, Chunk, Done]
    assert [e.raw for e in events if isinstance(e, Chunk)] == [ROLE, *tokens(1, 3), finish()]


@pytest.mark.parametrize(
    "broken", [STREAM[:-10], STREAM.replace(DONE, b""), b"data: {oops\n\n" + DONE, b"data: [1]\n\n" + DONE, b"\xff\n\n"]
)
async def test_a_stream_that_breaks_off_or_is_not_json_is_broken(broken):
    with pytest.raises(StreamBroken):
        await read([broken])


async def test_an_error_of_the_reader_never_shows_what_was_read():
    with pytest.raises(StreamBroken) as caught:
        await read([b'data: {"secret prompt\n\n'])
    assert "secret" not in str(caught.value)
