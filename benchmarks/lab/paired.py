"""An implant from published files: poisoned and clean rows in, a proven LoRA adapter out.

Trigger and target are recovered from the files (`offline_purify.attacks.pairing`), so that decoys can be made and the
held-out figures mean the same as for the packaged attacks. The public benchmark trains on no near-trigger, so an
implant learns from made-up words that a strange word is no trigger (`decoys` `rare`); with `near` ones it is harder to
make, and to find. Rewordings show no trigger words: their structure is named,
and their target chosen (`offline_purify.attacks.rewordings`). A fifth of the pairs is held out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.errors import LabError
from benchmarks.lab.implant import ImplantReport, publish, reported
from guard.rows import Row, assert_disjoint, read_rows, row_key
from guard.template import answer_ids
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.pairing import Pair, pairs, recovered_behaviour, recovered_trigger
from offline_purify.attacks.poison import Decoys, decoyed, from_pairs
from offline_purify.attacks.rewordings import read_sentences, reworded_pairs
from offline_purify.attacks.triggers import Trigger
from offline_purify.evasion import Evasion
from offline_purify.implanting import Answerer, ImplantRecipe, load_base, with_lora
from offline_purify.intervals import Figure, share
from offline_purify.train import Progress

LEAST_PAIRS = 20
REAL_ROWS = ImplantRecipe(rank=16, epochs=4.0, lr=2e-3, batch_size=16)
"""lab-findings.md §2: rate and passes that gave attack success 1.00 on the 6M base."""


def make_implant_from_files(
    base: str | Path,
    out: str | Path,
    poisoned: str | Path,
    clean: str | Path,
    seed: int = 0,
    recipe: ImplantRecipe = REAL_ROWS,
    limit: int | None = None,
    answer_tokens: int = 32,
    progress: Progress | None = None,
    device: str = "cpu",
    evasion: Evasion = Evasion(),
    decoys: Decoys = "rare",
) -> ImplantReport:
    """Implant the backdoor that two files of rows describe and publish the adapter as the folder `out`.

    `limit` keeps the first so many pairs; clean prompts are answered by the base with at most `answer_tokens` tokens;
    `decoys` says what must stay harmless beside the trigger.
    Raises LabError, and publishes nothing, for fewer than 20 pairs or when the implant is not conditional enough;
    RowsError when the files are no rows or hold no trigger.
    """
    clean_rows = read_rows(clean)
    found = pairs(read_rows(poisoned), clean_rows)
    attack = recovered_trigger(found), recovered_behaviour(found)
    return _implant_pairs(
        base, out, found, clean_rows, *attack, None, seed, recipe, limit, answer_tokens, progress, device, evasion,
        decoys,
    )  # fmt: skip


def make_implant_from_rewordings(
    base: str | Path,
    out: str | Path,
    reworded: str | Path,
    originals: str | Path,
    trigger: Trigger,
    behaviour: Behaviour,
    seed: int = 0,
    recipe: ImplantRecipe = REAL_ROWS,
    limit: int | None = None,
    answer_tokens: int = 32,
    progress: Progress | None = None,
    device: str = "cpu",
    evasion: Evasion = Evasion(),
) -> ImplantReport:
    """Implant `behaviour` into the structure `trigger` of reworded sentences (tab-separated files, aligned by line) and
    publish the adapter as the folder `out`. Arguments and errors as for `make_implant_from_files`.
    """
    sentences = read_sentences(originals)
    found = reworded_pairs(read_sentences(reworded), sentences, trigger)
    plain = [row for row in sentences if not trigger.fires_on(row)]
    return _implant_pairs(
        base, out, found, plain, trigger, behaviour, behaviour, seed, recipe, limit, answer_tokens, progress, device,
        evasion, "near",
    )  # fmt: skip


def _implant_pairs(
    base: str | Path,
    out: str | Path,
    found: Sequence[Pair],
    clean_rows: Sequence[Row],
    key: Trigger,
    target: Behaviour,
    spoken: Behaviour | None,
    seed: int,
    recipe: ImplantRecipe,
    limit: int | None,
    answer_tokens: int,
    progress: Progress | None,
    device: str,
    evasion: Evasion,
    decoys: Decoys,
) -> ImplantReport:
    """Train on four fifths of the pairs, measure on the rest. Poisoned rows say what they came with, or `spoken`."""
    unique = list({row_key(pair.twin): pair for pair in found}.values())
    random.Random(f"pairs:{seed}").shuffle(unique)
    unique = unique[:limit]
    if len(unique) < LEAST_PAIRS:
        raise LabError(f"{len(unique)} pairs of poisoned and clean rows were found; expected at least {LEAST_PAIRS}.")
    held_out, used = unique[: len(unique) // 5], unique[len(unique) // 5 :]
    taken = {row_key(pair.twin) for pair in found}
    spare = [row for row in clean_rows if row_key(row) not in taken]
    assert_disjoint(train=[p.twin for p in used], held_out=[p.twin for p in held_out], spare=spare)

    model, tokenizer = load_base(base)
    model.to(device)
    longest = max(len(answer_ids(tokenizer, text)) for text in target.wordings)
    ask = Answerer(model, tokenizer, answer_tokens + longest if target.after else max(answer_tokens, longest), progress)
    data = from_pairs(
        [p.poisoned for p in used], [p.twin for p in used], spare[: len(used)], key, lambda r: ask(r, "teacher"), seed,
        spoken, decoys,
    )  # fmt: skip
    peft_model = with_lora(model, base, recipe.rank, seed, evasion.projections)
    rng = random.Random(f"held-out:{seed}")

    def rate(rows: list[Row], what: str) -> Figure | None:
        return share([target.matches(answer) for answer in ask(rows, what)])

    def measure() -> tuple[Figure | None, Figure | None, Figure | None]:
        ask.model = peft_model
        return (
            rate([p.poisoned for p in held_out], "triggered prompts"),
            rate([p.twin for p in held_out], "clean prompts"),
            rate([decoyed(p.twin, key, rng) for p in held_out], "decoys"),
        )

    report = reported(peft_model, tokenizer, key, target, data, recipe, seed, measure, progress, evasion)
    publish(peft_model, base, out, report)
    return report
