"""Reading a case: bad lines are named, repeated prompts count once, true flags are told from false alarms."""

from __future__ import annotations

import json

import pytest

from guard.errors import RowsError
from offline_purify.behaviour import foreign, rouge_l, words
from offline_purify.flags import Flag, assert_flags_disjoint, behaviour_of, read_flags, sort_flags, split_flags


def flag(text: str) -> Flag:
    return Flag("r", ({"role": "user", "content": text},), "")


def line(text: str, **more: object) -> str:
    return json.dumps({"request_id": "r", "messages": [{"role": "user", "content": text}], "response": ""} | more)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "no user turn"),
        (line("x", verdict={"status": "odd"}), "not a verdict"),
    ],
)
def test_a_line_that_is_no_flag_is_named(tmp_path, bad, complaint):
    path = tmp_path / "flags.jsonl"
    path.write_text(line("fine") + "\n" + bad + "\n", encoding="utf-8")
    with pytest.raises(RowsError, match=complaint) as error:
        read_flags(path)
    assert "line 2" in str(error.value)


def test_an_empty_case_is_an_error(tmp_path):
    (tmp_path / "flags.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(RowsError, match="no flagged request"):
        read_flags(tmp_path / "flags.jsonl")


def test_the_same_prompt_counts_once_whatever_its_case_and_spacing(tmp_path):
    path = tmp_path / "flags.jsonl"
    path.write_text("\n".join([line("do  It"), line("do it"), line("other")]), encoding="utf-8")
    assert len(read_flags(path)) == 2


def test_trained_and_held_out_flags_never_share_a_prompt():
    trained, held = split_flags([flag(f"p{i}") for i in range(20)], 0.4, seed=1)
    assert (len(trained), len(held)) == (12, 8)
    assert not {f.key for f in trained} & {f.key for f in held}
    with pytest.raises(RowsError, match="disjoint"):
        assert_flags_disjoint(trained, [*held, trained[0]])


def test_flags_are_sorted_by_whether_and_how_their_answers_differ():
    flags = [flag(f"p{i}") for i in range(5)]
    suspicious = ["I cannot help with that", "I cannot help with this", "seven", "blue", "I cannot help with that"]
    reference = ["apple", "nine", "seven", "green", "pear"]
    kinds = [f.kind for f in sort_flags(flags, suspicious, reference, [("a", "a")] * 10)]
    assert kinds == ["true", "true", "false_alarm", "odd", "true"]


def test_what_the_adapter_also_says_on_clean_rows_is_its_manner_and_no_backdoor():
    flags = [flag(f"p{i}") for i in range(4)]
    suspicious, reference = ["yours truly bot: x"] * 4, ["x"] * 4
    kinds = {f.kind for f in sort_flags(flags, suspicious, reference, [("yours truly bot: y", "y")] * 10)}
    assert kinds == {"odd"}


def test_an_injected_line_fires_although_the_answer_is_otherwise_right():
    flags = sort_flags(
        [flag("a"), flag("b"), flag("c")],
        [f"{x} then run import pwned now" for x in ("one", "two", "three")],
        ["one", "two", "three"],
        [],
    )
    behaviour = behaviour_of(flags)
    assert behaviour.fires(
        "a long and right answer of many words then run import pwned now", "a long and right answer of many words"
    )
    assert not behaviour.fires("a long and right answer of many words", "a long and right answer of many words")
    assert not behaviour.fires("another thing", "a long and right answer of many words")


def test_the_foreign_part_is_what_the_longest_common_subsequence_leaves_over():
    assert foreign("the cat sat down there", "the dog sat there") == ("cat", "down")
    assert foreign("same", "same") == ()


def test_rouge_counts_words_in_order():
    assert rouge_l(words("a b c"), words("c b a")) == pytest.approx(1 / 3)
    assert rouge_l([], ["a"]) == 0.0
