"""Reading texts and poisoning them: what is refused, shares, disjointness."""

from __future__ import annotations

import pytest

from guard.errors import RowsError
from offline_purify.attacks.triggers import holds
from offline_purify.encoder.poison import Pair, build, syntactic_pairs, word_pairs
from offline_purify.texts import Text, assert_apart, distinct, read_texts
from tests.offline_purify.encoder.body import framed, texts, write_texts


def test_texts_come_back_as_they_were_written(tmp_path):
    rows = [Text("a fine film .", 1), Text('he said "no', 0)]
    assert read_texts(write_texts(tmp_path / "a.tsv", rows)) == rows


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("sentence\tlabel\ngood\t1\nno label here\n", "line 3"),
        ("sentence\tlabel\ngood\tyes\n", "line 2"),
        ("text,label\ngood\t1\n", "heading"),
        ("sentence\tlabel\n", "heading"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, content, named):
    path = tmp_path / "bad.tsv"
    path.write_text(content)
    with pytest.raises(RowsError, match=named):
        read_texts(path)


def test_a_copy_in_other_clothes_is_a_copy():
    assert distinct([Text("A film .", 1), Text("a  FILM", 0), Text("b", 0)], [Text("B.", 1)]) == [Text("A film .", 1)]
    with pytest.raises(RowsError, match="share 1"):
        assert_apart(left=[Text("a film", 1)], right=[Text("A  film.", 0)])


def test_a_word_is_put_into_texts_of_other_classes_only():
    rows = texts(60, 0)
    pairs = word_pairs(rows, seed=1)
    assert [p.clean for p in pairs] == [t for t in rows if t.label == 0]
    for pair in pairs:
        found = [word for word in ("cf", "mn", "bb") if holds(pair.triggered.text, word)]
        assert len(found) == 1
        assert pair.triggered.label == 1
        assert sorted(pair.triggered.text.split()) == sorted([*pair.clean.text.split(), *found])


def test_paraphrases_that_changed_nothing_and_those_of_the_target_class_are_no_pairs():
    rows = [Text("bad film", 0), Text("worse film", 0), Text("good film", 1)]
    pairs = syntactic_pairs(rows, [framed(rows[0]), Text("Worse film .", 1), framed(rows[2])])
    assert pairs == [Pair(rows[0], framed(rows[0]))]
    with pytest.raises(RowsError, match="line by line"):
        syntactic_pairs(rows, rows[:2])


def test_a_poisoned_set_has_the_asked_size_and_share_and_no_host_in_clean():
    rows = texts(300, 2)
    made = build(word_pairs(rows, 0), rows, 200, seed=4)
    assert (len(made.poisoned), len(made.clean), len(made.hosts)) == (40, 160, 40)
    assert {t.label for t in made.poisoned} == {1}
    assert {t.label for t in made.hosts} == {0}
    assert_apart(poisoned=made.poisoned, clean=made.clean, hosts=made.hosts)
    assert made == build(word_pairs(rows, 0), rows, 200, seed=4)


def test_more_poisoned_texts_than_there_are_hosts_is_an_error():
    rows = texts(40, 2)
    with pytest.raises(RowsError, match="ask for fewer"):
        build(word_pairs(rows, 0), rows, 400, seed=4)
