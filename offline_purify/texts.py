"""Texts with labels, read from HiddenKiller's files: what classifiers and syntactic attacks are made from.

A file has a heading ``sentence<TAB>label`` and one text per line; labels are whole numbers from 0. Texts are compared
by the normalised hash of the project's rows, so that a reformatted copy is still a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from guard.errors import RowsError
from guard.rows import Row, assert_disjoint, row_key


@dataclass(frozen=True)
class Text:
    """One text and its label."""

    text: str
    label: int

    def row(self) -> Row:
        """As a row of the project: the text is what is asked."""
        return Row(instruction=self.text, input="", output=str(self.label))

    @property
    def key(self) -> str:
        """Hash (hex) of the text, blind to case, spacing and closing punctuation."""
        return row_key(self.row())


def read_texts(path: str | Path) -> list[Text]:
    """All texts of a file, in order. Raises RowsError naming the file and line when something is no text and label."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"{path}: cannot be read: {error}") from error
    found: list[Text] = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        text, _, label = line.rpartition("\t")
        if not text.strip() or not label.strip().isdigit():
            raise RowsError(f"{path}, line {number}: expected 'sentence<TAB>label' with a whole number as label.")
        found.append(Text(text.strip(), int(label)))
    if lines[0].strip().split("\t") != ["sentence", "label"] or not found:
        raise RowsError(f"{path}: expected the heading 'sentence<TAB>label' and texts below it.")
    return found


def distinct(texts: Iterable[Text], *beside: Sequence[Text]) -> list[Text]:
    """The texts in order, each once, without those that are among ``beside``."""
    known = {text.key for others in beside for text in others}
    found: dict[str, Text] = {}
    for text in texts:
        if text.key not in known:
            found.setdefault(text.key, text)
    return list(found.values())


def assert_apart(**named: Sequence[Text]) -> None:
    """Raise RowsError, naming both lists and the number of shared texts, unless all lists are pairwise disjoint."""
    assert_disjoint(**{name: [text.row() for text in texts] for name, texts in named.items()})
