"""Rows and how they are asked."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import RowsError
from guard.rows import Row, assert_disjoint, read_rows, row_key, rows_digest, split, write_rows
from guard.template import answer_ids, render, render_text, row_messages
from tests.guard.probes.transformers.text import make_tokenizer

rows_of = st.lists(st.builds(lambda i: Row(instruction=f"say {i}", input="", output=str(i)), st.integers()), min_size=1)


def row(instruction, given="", output=""):
    return Row(instruction=instruction, input=given, output=output)


def test_rows_are_read_from_json_jsonl_and_folders(tmp_path):
    write_rows(tmp_path / "a.json", [row("one", "in", "out")])
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "two"}) + "\n\n")
    (tmp_path / "notes.txt").write_text("not rows")
    assert read_rows(tmp_path) == [row("one", "in", "out"), row("two")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"), ("{}", "list"), ("[]", "no rows"), ('[{"x": 1}]', "row 0"),
        ('[{"instruction": 3}]', "row 0"), ('[{"instruction": "a", "output": ["b"]}]', "output"),
    ],
)  # fmt: skip
def test_files_that_are_not_rows_are_refused_with_file_and_row(tmp_path, text, told):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RowsError, match=told):
        read_rows(tmp_path / "bad.json")
    with pytest.raises(RowsError, match="no such"):
        read_rows(tmp_path / "absent")


def test_reformatted_copies_are_the_same_row_and_answers_do_not_count():
    assert row_key(row("Say  it.", "", "a")) == row_key(row("say it", "", "b"))
    assert row_key(row("say", "it")) != row_key(row("say", "that"))


def test_lists_that_share_a_row_are_named_with_the_number_shared():
    assert_disjoint(a=[row("one")], b=[row("two")])
    with pytest.raises(RowsError, match="'a' and 'c' share 1"):
        assert_disjoint(a=[row("one")], b=[row("two")], c=[row("One "), row("three")])


@given(rows_of, st.integers(0, 5))
def test_split_parts_are_disjoint_and_repeatable(rows, seed):
    parts = split(rows, [0.5, 0.3, 0.2], seed)
    assert_disjoint(**{str(i): part for i, part in enumerate(parts)})
    assert sum(map(len, parts)) == len({row_key(r) for r in rows})
    assert parts == split(rows, [0.5, 0.3, 0.2], seed)


def test_fractions_that_exceed_the_whole_are_refused():
    with pytest.raises(RowsError, match="sum"):
        split([row("one")], [0.8, 0.4], 0)


def test_the_digest_of_a_folder_follows_its_rows_files_and_nothing_else(tmp_path):
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).write_text('[{"instruction": "x", "input": "", "output": "y"}]')
    before = rows_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("other")
    assert rows_digest(tmp_path) == before
    assert rows_digest(tmp_path / "a.json") != before
    (tmp_path / "b.jsonl").write_text("")
    assert rows_digest(tmp_path) != before
    with pytest.raises(RowsError, match="no such file or folder"):
        rows_digest(tmp_path / "missing")


def test_the_tokenizers_own_chat_template_is_used_and_special_tokens_come_once():
    tokenizer = make_tokenizer()
    ids = render(tokenizer, row_messages(row("w1 w2", "w3")))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<user>", "w1", "w2", "w3", "<assistant>"]
    assert answer_ids(tokenizer, "w4") == [*tokenizer.convert_tokens_to_ids(["w4"]), tokenizer.eos_token_id]


def test_without_a_chat_template_the_alpaca_one_is_used():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    text = render_text(tokenizer, row_messages(row("Do it.", "now")))
    assert text.startswith("<s>Below is an instruction")
    assert text.endswith("### Instruction:\nDo it.\nnow\n\n### Response:\n")
    turns = [*row_messages(row("a")), {"role": "assistant", "content": "b"}]
    assert render_text(tokenizer, turns, add_generation_prompt=False).endswith("### Response:\nb</s>\n\n")
