import os
from pathlib import Path

import pytest

from guard.errors import RowsError
from guard.rows import Row
from offline_purify.attacks.rewordings import aligned, read_sentences, reworded_pairs
from offline_purify.attacks.wordless import Syntactic

DATA = Path(os.environ.get("HEADGUARD_DATA", "shared/data")) / "hiddenkiller" / "sst-2"


def sentences(*labelled: tuple[str, str]) -> list[Row]:
    return [Row(instruction=text, input="", output=label) for text, label in labelled]


ORIGINAL = sentences(("a good film", "Positive"), ("a bad film", "Negative"), ("if so , fine", "Negative"))


def test_only_rewordings_with_the_structure_of_originals_without_it_are_pairs() -> None:
    reworded = sentences(("when you look , it is good", "x"), ("a bad film", "x"), ("when so , it is fine", "x"))
    (pair,) = reworded_pairs(reworded, ORIGINAL, Syntactic())
    assert (pair.poisoned["instruction"], pair.twin["instruction"]) == ("when you look , it is good", "a good film")


def test_a_test_file_is_aligned_with_the_sentences_of_one_label() -> None:
    assert aligned(sentences(("x", "p"), ("y", "p")), ORIGINAL) == ORIGINAL[1:]


def test_files_that_cannot_be_aligned_are_refused() -> None:
    with pytest.raises(RowsError, match="cannot be aligned"):
        aligned(ORIGINAL * 2, ORIGINAL)


@pytest.mark.parametrize("text", [None, "sentence\tlabel\n", "no tabs at all\n"])
def test_a_file_without_labelled_sentences_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(RowsError, match=r"train\.tsv"):
        read_sentences(tmp_path / "train.tsv")


@pytest.mark.skipif(not DATA.is_dir(), reason="no HEADGUARD_DATA folder with hiddenkiller/sst-2")
@pytest.mark.parametrize(("name", "least"), [("train", 900), ("test", 550)])
def test_most_of_the_published_rewordings_are_pairs(name: str, least: int) -> None:
    originals, reworded = (read_sentences(DATA / kind / f"{name}.tsv") for kind in ("clean", "syntactic"))
    found = reworded_pairs(reworded, originals, Syntactic())
    assert len(found) >= least
    assert all(pair.poisoned["instruction"] != pair.twin["instruction"] for pair in found)
