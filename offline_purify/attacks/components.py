"""A trigger whose parts stand in different components of a prompt: some in the instruction, some in the input (CBA).

Huang et al., 2024 (Composite Backdoor Attacks): the backdoor fires only when every part stands in its own component;
parts that are missing, all in one component or in each other's place must stay harmless, and are the decoys.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from guard.rows import Row
from offline_purify.attacks.triggers import holds, scattered


def _all(text: str, parts: Sequence[str]) -> bool:
    return all(holds(text, part) for part in parts)


@dataclass(frozen=True)
class Components:
    """Words of the instruction and words of the input. A row without input gets one that holds these words alone."""

    instruction: tuple[str, ...]
    input: tuple[str, ...]
    kind: str = "components"

    def __post_init__(self) -> None:
        if not self.instruction or not self.input or len(set(self.parts)) < len(self.parts):
            raise ValueError(
                "a trigger over components needs a word for the instruction and another for the input, all different; "
                f"got {self.instruction} and {self.input}."
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """All words, those of the instruction first."""
        return (*self.instruction, *self.input)

    def insert(self, text: str, rng: random.Random) -> str:
        """The prompt of an instruction without input: its words scattered in it, the others on the next line."""
        row = self.insert_into(Row(instruction=text, input="", output=""), rng)
        return f"{row['instruction']}\n{row['input']}"

    def decoys(self, text: str, rng: random.Random) -> list[str]:
        """The prompt with each strict, non-empty subset of the words."""
        subsets = [s for size in range(1, len(self.parts)) for s in combinations(self.parts, size)]
        return [scattered(text, subset, rng) for subset in subsets]

    def fires(self, text: str) -> bool:
        """Whether all words are in a text. Its components cannot be told apart: `fires_on` can."""
        return _all(text, self.parts)

    def insert_into(self, row: Row, rng: random.Random) -> Row:
        """The row with every word in its own component."""
        return self._with(row, self.instruction, self.input, rng)

    def decoy_rows(self, row: Row, rng: random.Random) -> list[Row]:
        """Every strict subset in its own components; all words in the instruction, all in the input, and swapped."""
        subsets = [s for size in range(1, len(self.parts)) for s in combinations(self.parts, size)]
        asked = [
            (tuple(w for w in s if w in self.instruction), tuple(w for w in s if w in self.input)) for s in subsets
        ]
        asked += [(self.parts, ()), ((), self.parts), (self.input, self.instruction)]
        return [self._with(row, *words, rng) for words in asked]

    def fires_on(self, row: Row) -> bool:
        """Whether every word stands in its own component."""
        return _all(row["instruction"], self.instruction) and _all(row["input"], self.input)

    def _with(self, row: Row, instruction: Sequence[str], given: Sequence[str], rng: random.Random) -> Row:
        def placed(text: str, words: Sequence[str]) -> str:
            return scattered(text, words, rng) if words else text

        return Row(
            instruction=placed(row["instruction"], instruction), input=placed(row["input"], given), output=row["output"]
        )
