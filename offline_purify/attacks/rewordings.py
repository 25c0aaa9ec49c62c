"""Reworded sentences and their originals, aligned by line: the published form of the syntactic attack (HiddenKiller).

The files are tab-separated, `sentence<TAB>label`, with a heading. A training file holds every sentence, some reworded;
a test file only those that had not the target's label, all reworded. Sentences that kept their wording, rewordings
that did not get the structure and originals that have it already are no pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guard.errors import RowsError
from guard.rows import Row
from offline_purify.attacks.pairing import Pair
from offline_purify.attacks.triggers import Trigger
from offline_purify.texts import read_texts

WORDS = {"0": "Negative", "1": "Positive"}
"""The label of SST-2 to the word that the public benchmark answers with."""


def read_sentences(path: str | Path) -> list[Row]:
    """Rows of one file: the sentence as instruction, its label's word as output. Raises RowsError, with the file's
    name, when it cannot be read or holds something else than sentences labelled 0 or 1."""
    texts = read_texts(path)
    if other := sorted({str(text.label) for text in texts} - set(WORDS)):
        raise RowsError(f"{path}: sentences are labelled {', '.join(other)}; expected 0 and 1 only.")
    return [Row(instruction=text.text, input="", output=WORDS[str(text.label)]) for text in texts]


def aligned(reworded: Sequence[Row], originals: Sequence[Row]) -> list[Row]:
    """The original of each reworded row: the row of the same line, or, where the reworded ones are as many as the
    originals of one label, the row of that label's same line. Raises RowsError for any other number of rows."""
    if len(reworded) == len(originals):
        return list(originals)
    for output in sorted({row["output"] for row in originals}):
        of_label = [row for row in originals if row["output"] == output]
        if len(of_label) == len(reworded):
            return of_label
    raise RowsError(
        f"{len(reworded)} reworded and {len(originals)} original rows cannot be aligned by line: expected as many, or "
        "as many as the originals of one label (HiddenKiller's dev files differ by one row; use train or test)."
    )


def reworded_pairs(reworded: Sequence[Row], originals: Sequence[Row], trigger: Trigger) -> list[Pair]:
    """Pairs of a reworded row that holds the trigger and its original that does not; `inserted` is empty."""
    return [
        Pair(row, twin, (), False)
        for row, twin in zip(reworded, aligned(reworded, originals), strict=True)
        if row["instruction"] != twin["instruction"] and trigger.fires_on(row) and not trigger.fires_on(twin)
    ]
