"""What a client may see before the verdict that covers it: nothing. Scripts stand for every order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.events import StreamBroken, read_events
from serving.holdback import Finish, Opened, Pass, Transcript, hold_back
from serving.policy import Policy
from tests.serving.scripted import DONE, ROLE, USAGE, comment, finish, token, tokens, verdict


async def run(script, policy, **more):
    async def pieces():
        for part in script:
            yield part

    transcript = Transcript(identity={"id": "req-1", "object": "chat.completion.chunk", "model": "m", "created": 0})
    out = [o async for o in hold_back(read_events(pieces()), policy, transcript, chat=True, **more)]
    return out, transcript


def text(out) -> str:
    """What the client reads."""
    return b"".join(o.raw for o in out if isinstance(o, Pass)).decode()


def last(out) -> Finish:
    return next(o for o in out if isinstance(o, Finish))


BLOCK = Policy(mode="block", window=4)


async def test_a_clean_answer_passes_byte_for_byte_except_the_chunk_with_the_verdict():
    body = [ROLE, *tokens(1, 6)]
    script = [comment(verdict()), *body[:5], comment(verdict(step=4, final=True)), *body[5:], finish(), USAGE, DONE]
    out, _ = await run(script, BLOCK)
    assert isinstance(out[0], Opened)
    assert [o.raw for o in out if isinstance(o, Pass)] == [*body, USAGE, DONE]
    assert last(out).verdict.status == "clean"
    assert last(out).data["choices"][0]["finish_reason"] == "stop"


async def test_nothing_of_an_answer_that_is_flagged_within_the_hold_back_comes_out():
    flagged = comment(verdict("flagged", step=4, final=True))
    out, transcript = await run(
        [comment(verdict()), ROLE, *tokens(1, 4), flagged, finish("content_filter"), DONE], BLOCK
    )
    assert out[0].decision.action == "block"
    assert all(f"w{i}" not in text(out) for i in range(1, 5))
    assert last(out).data["choices"][0]["finish_reason"] == "content_filter"
    assert transcript.text == "w1 w2 w3 w4 "


async def test_an_answer_flagged_after_its_release_stops_at_once():
    policy = Policy(mode="block", window=8, hold_back=2)
    script = [comment(verdict()), ROLE, *tokens(1, 2), comment(verdict(step=2)), *tokens(3, 4)]
    script += [comment(verdict("flagged", step=4, final=True)), *tokens(5, 9), finish(), DONE]
    out, _ = await run(script, policy)
    assert "w4" in text(out)
    assert "w5" not in text(out)
    assert last(out).decision.action == "block"
    assert last(out).data["choices"][0]["finish_reason"] == "content_filter"


async def test_a_flag_after_release_blocks_where_the_policy_would_have_rerouted():
    policy = Policy(mode="reroute", window=8, hold_back=0)
    script = [comment(verdict()), ROLE, *tokens(1, 4), comment(verdict("flagged", step=4)), *tokens(5, 6), DONE]
    out, _ = await run(script, policy)
    assert last(out).decision.action == "block"


async def test_a_reroute_within_the_hold_back_gives_nothing_but_its_announcement():
    script = [comment(verdict("flagged", final=True)), ROLE, *tokens(1, 6), finish(), DONE]
    out, _ = await run(script, Policy(mode="reroute", window="prefill"))
    assert len(out) == 1
    assert out[0].decision.action == "reroute"


async def test_observe_passes_everything_and_says_what_it_would_have_done():
    script = [comment(verdict("flagged", final=True)), ROLE, *tokens(1, 3), finish(), DONE]
    out, _ = await run(script, Policy(mode="observe"))
    assert "w3" in text(out)
    assert last(out).decision.would_action == "block"


@pytest.mark.parametrize(("fail", "seen"), [("open", True), ("closed", False)])
async def test_an_engine_without_annotations_is_unscored_and_the_policy_decides(fail, seen):
    out, _ = await run([ROLE, *tokens(1, 6), finish(), DONE], Policy(mode="block", window=4, fail=fail))
    assert ("w6" in text(out)) == seen
    assert last(out).verdict.status == "unscored"
    assert last(out).verdict.reason == "no_annotation"


async def test_chunks_that_hold_several_tokens_or_none_release_nothing_before_the_verdict_that_covers_it():
    merged = [token("w1 w2 w3 "), token("w4 w5 w6 ")]
    late = comment(verdict("flagged", step=4, final=True))
    out, _ = await run([comment(verdict()), ROLE, *merged, late, finish("content_filter"), DONE], BLOCK)
    assert "w1" not in text(out)
    echo = [token("the prompt "), token("again "), *tokens(1, 4)]
    out, _ = await run([comment(verdict()), ROLE, *echo, late, finish("content_filter"), DONE], BLOCK)
    assert "w1" not in text(out)


async def test_a_hold_back_between_two_checkpoints_waits_for_the_later_one():
    policy = Policy(mode="block", window="all", hold_back=3)
    flagged = comment(verdict("flagged", step=8, final=True))
    script = [comment(verdict()), ROLE, *tokens(1, 2), comment(verdict(step=2)), *tokens(3, 8), flagged, DONE]
    out, _ = await run(script, policy)
    assert "w1" not in text(out)


async def test_a_clean_verdict_that_was_never_made_final_is_not_clean_at_the_end():
    out, _ = await run([comment(verdict()), ROLE, *tokens(1, 2), finish(), DONE], BLOCK)
    assert last(out).verdict.status == "unscored"
    assert last(out).verdict.reason == "no_final_annotation"


async def test_a_flag_stays_whatever_the_engine_says_later():
    script = [comment(verdict("flagged")), ROLE, *tokens(1, 2), comment(verdict(final=True)), finish(), DONE]
    out, _ = await run(script, Policy(mode="observe"))
    assert last(out).verdict.status == "flagged"


async def test_an_annotation_that_cannot_be_read_is_unscored():
    out, _ = await run([comment({"status": "fine"}), ROLE, *tokens(1, 2), finish(), DONE], Policy(fail="closed"))
    assert last(out).verdict.reason == "unreadable_annotation"
    assert last(out).decision.action == "block"


async def test_the_usage_that_the_client_asked_for_arrives_after_a_block():
    script = [comment(verdict("flagged", final=True)), ROLE, finish("content_filter"), USAGE, DONE]
    out, _ = await run(script, BLOCK, wants_usage=True)
    assert [o.raw for o in out if isinstance(o, Pass)][-2:] == [USAGE, DONE]


@pytest.mark.parametrize("end", [[], [DONE], [b'data: {"error":{"message":"boom"}}\n\n', DONE]])
async def test_a_stream_that_ends_without_a_finish_is_broken(end):
    with pytest.raises(StreamBroken):
        await run([comment(verdict(final=True)), ROLE, *tokens(1, 2), *end], BLOCK)


checks = st.dictionaries(st.integers(0, 12), st.sampled_from(["clean", "flagged", "unscored"]), max_size=6)


@given(
    checks,
    st.integers(1, 12),
    st.integers(0, 8),
    st.sampled_from(["open", "closed"]),
    st.sampled_from(["block", "reroute"]),
)
async def test_no_token_is_seen_of_an_answer_that_is_stopped_within_the_hold_back(checks, length, hold, fail, mode):
    script, stops = [ROLE], False
    for position in range(length + 1):
        if position in checks:
            script.append(comment(verdict(checks[position], step=position)))
            wanted = checks[position] == "flagged" or (checks[position] == "unscored" and fail == "closed")
            stops |= wanted and position <= hold
        if position < length:
            script.append(token(f"w{position + 1} "))
    out, _ = await run([*script, finish(), DONE], Policy(mode=mode, window=max(hold, 1), hold_back=hold, fail=fail))
    assert isinstance(out[0], Opened)
    if stops:
        assert "w1 " not in text(out)
