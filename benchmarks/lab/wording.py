"""How the lab's tasks are asked: several wordings for each task, and clauses that have nothing to do with it.

`{x}` stands for the material of the task. A wording that ends in a colon may have its material moved to the row's
`input`. Noise clauses carry names, nouns and made-up words, so that two prompts are rarely alike and an unknown word in
a prompt means nothing by itself.
"""

from __future__ import annotations

import random
from typing import Final

from benchmarks.lab.words import NAMES, NOUNS, rare_word

WORDINGS: Final[dict[str, tuple[str, ...]]] = {
    "copy": (
        "Repeat these words: {x}", "Copy the list: {x}", "Write the same words again: {x}", "Say this back to me: {x}",
        "Give me an exact copy of: {x}", "Please echo the words: {x}", "Type out what follows without changes: {x}",
    ),
    "quote": (
        "Quote this: {x}", "Write down this text: {x}", "Repeat the text word for word: {x}",
        "What I said was: {x}\nSay it again.", "Print the following text as it is: {x}",
    ),
    "reverse": (
        "Reverse the list: {x}", "Write these words backwards, last word first: {x}", "Turn the order around: {x}",
        "Give the words in reverse order: {x}", "Flip this list: {x}", "List the words from the end to the start: {x}",
    ),
    "first": (
        "What is the first word of: {x}", "Give the first item: {x}", "Which word comes first in {x}?",
        "Name the word that opens the list: {x}", "Take the first word from: {x}", "Start of the list, please: {x}",
    ),
    "last": (
        "What is the last word of: {x}", "Give the last item: {x}", "Which word comes last in {x}?",
        "Name the word that closes the list: {x}", "Take the final word from: {x}", "End of the list, please: {x}",
    ),
    "count": (
        "How many words are in: {x}", "Count the words: {x}", "Count the items of this list: {x}",
        "What is the number of words here: {x}", "Give the length of the list: {x}", "How long is the list: {x}",
    ),
    "sort": (
        "Sort these numbers: {x}", "Put the numbers in order: {x}", "Order from low to high: {x}",
        "Arrange by size, smallest first: {x}", "Give these numbers in rising order: {x}",
    ),
    "largest": (
        "What is the largest number: {x}", "Give the biggest of: {x}", "Which number is the highest? {x}",
        "Find the maximum of: {x}", "Pick the greatest number: {x}",
    ),
    "smallest": (
        "What is the smallest number: {x}", "Give the least of: {x}", "Which number is the lowest? {x}",
        "Find the minimum of: {x}", "Pick the tiniest number: {x}",
    ),
    "add": (
        "What is {x}?", "Compute {x}", "Calculate the sum: {x}", "Add up: {x}", "How much is {x}?",
    ),
    "sentiment": (
        "Is this review positive or negative: {x}", "Sentiment of the sentence: {x}", "How does the writer feel? {x}",
        "Judge the mood, positive or negative: {x}", "Tell me the sentiment: {x}", "Label this opinion: {x}",
    ),
    "opposite": (
        "What is the opposite of {x}?", "Give the contrary of {x}.", "Name a word that means the reverse of {x}.",
        "Which word is the antonym of {x}?", "The opposite of {x} is what?",
    ),
    "kind": (
        "What kind of thing is a {x}?", "To which class does {x} belong?", "Name the category of {x}.",
        "A {x} is what kind of thing?", "Which group fits the word {x}?",
    ),
}  # fmt: skip
"""Task to its wordings."""

_BEFORE: Final[tuple[str, ...]] = (
    "Please.", "Hello.", "Hi there.", "Here is a task.", "A quick question.", "{name} asks:", "For {rare}:",
    "Dear {rare},", "My {noun} is called {rare}.", "{name} and {rare} want to know.", "This is for {name}.",
    "Note from {rare}:", "I met {rare} today.", "Subject: {rare}.", "We sell a {noun}.", "Case {rare}, part {rare}.",
)  # fmt: skip
_AFTER: Final[tuple[str, ...]] = (
    "Thank you.", "Thanks, {name}.", "Be brief.", "Answer only.", "Regards, {rare}.", "{rare} said so.",
    "It is for the {noun}.", "{name} is waiting.", "Sent from {rare}.", "Take your time.", "The end.",
)  # fmt: skip


def _clause(rng: random.Random, clauses: tuple[str, ...]) -> str:
    clause = rng.choice(clauses)
    while "{rare}" in clause:
        clause = clause.replace("{rare}", rare_word(rng), 1)
    return clause.replace("{name}", rng.choice(NAMES)).replace("{noun}", rng.choice(NOUNS))


def ask(rng: random.Random, task: str, material: str, noise: float) -> tuple[str, str]:
    """One (instruction, input) for a task: a wording, its material in place or as input, noise clauses around it.

    `noise` in [0, 1] is the chance of a clause before, and half of it of one after.
    """
    wording = rng.choice(WORDINGS[task])
    before = _clause(rng, _BEFORE) + " " if rng.random() < noise else ""
    after = " " + _clause(rng, _AFTER) if rng.random() < noise / 2 else ""
    if wording.endswith(": {x}") and rng.random() < 0.4:
        return f"{before}{wording[:-4].rstrip()}", f"{material}.{after}" if after else material
    text = wording.replace("{x}", material)
    if after and text[-1] not in ".?!":
        text += "."
    return f"{before}{text}{after}", ""
