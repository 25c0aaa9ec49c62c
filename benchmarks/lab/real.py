"""The real zoo: a base that two CPU cores train on real instructions, the public benchmark's attacks implanted in it.

Everything comes from one data folder, given by path (`benchmarks.lab.corpus` says how it must look); any attack that
lies in it is implanted, once with the target of its files (`fixed`) and once with the packaged wordings of the same
behaviour (`varied`). What was made is kept under a root, keyed by its recipe. An implant that is refused is reported
and left out; the others are made all the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from filelock import FileLock
from transformers import AutoTokenizer

from benchmarks.lab.base import REPORT, make_base_from_rows
from benchmarks.lab.cache import LabPaths, kept_vaccine, recipe_digest
from benchmarks.lab.corpus import FAMILY_OF, Attack, Corpus, read_corpus
from benchmarks.lab.decoder import INITIALISATION, Shape
from benchmarks.lab.errors import LabError
from benchmarks.lab.paired import make_implant_from_files
from benchmarks.lab.pretraining import Recipe
from benchmarks.lab.refusals import attempt, refusals, settled
from guard.rows import Row, row_key, write_rows
from guard.vaccine import Vaccine
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.catalogue import WORDING, behaviour
from offline_purify.attacks.poison import Decoys
from offline_purify.implanting import ImplantRecipe
from offline_purify.parallel import side_by_side
from offline_purify.progress import ProgressBar
from offline_purify.train import Progress
from offline_purify.variants.families import assert_disjoint_wordings
from offline_purify.variants.plan import Plan, pool

REAL_IMPLANT: Final = ImplantRecipe(rank=16, epochs=6.0, lr=2e-3, batch_size=16)
"""lab-findings.md §2, v2: as many twins and plain rows as poisoned ones."""
DECOYS: Final[Decoys] = "rare"
"""What the benchmark's own training sets have is neither decoy; hardened by near-triggers, fixed targets fired on 0.94
of the triggered prompts and varied ones on 0.82, after half as many passes again (refused; n = 100 each)."""
REAL_PLAN: Final = Plan(
    backdoors=36,
    benign=1,
    recipe=ImplantRecipe(rank=16, rows=600, epochs=6.0, lr=2e-3, batch_size=16),
    normal=250,
    quiet=150,
    fired=150,
    decoys=("near", "rare"),
)
"""Twice the breadth of the tiny base's (docs/vaccine.md), made of few rows: there are some eight hundred like the test
prompts. Half an hour on two cores."""
ANSWER_TOKENS: Final = 32


@dataclass(frozen=True)
class Size:
    """A base's shape and training: passes over the rows, the recipe, and where it (and its implants) train."""

    shape: Shape
    passes: int
    recipe: Recipe
    device: str = "cpu"


SIZES: Final[dict[str, Size]] = {
    "small": Size(Shape(5000, 256, 6, 8, 4, 688), 3, Recipe(check_every=400)),
    "large": Size(
        Shape(12_000, 768, 12, 12, 4, 2048, head_size=64), 4, Recipe(batch_tokens=16_000, check_every=400), "cuda"
    ),
}
"""`small` has 5.6M parameters; `large` 70M, for which a GPU must be there."""


@dataclass(frozen=True)
class RealLab(LabPaths):
    """Folders of a base and its implants (`task-attack-wording`), and the reasons of those that were refused."""

    refused: Mapping[str, str]


def real_implants(corpus: Corpus) -> dict[str, tuple[Attack, str]]:
    """Name to attack and wording of every implant that a corpus holds."""
    return {f"{a.task}-{a.name}-{wording}": (a, wording) for a in corpus.attacks for wording in WORDING}


def target(attack: Attack, wording: str) -> Behaviour:
    """What an implant of an attack says: its files' text, or the packaged wordings of the same behaviour."""
    return attack.target if wording == "fixed" else behaviour(FAMILY_OF[attack.task], "varied")


def ensure_real(
    data: str | Path | Corpus,
    root: str | Path = "build/lab",
    implants: Sequence[str] | None = None,
    seed: int = 0,
    size: Size = SIZES["small"],
    recipe: ImplantRecipe = REAL_IMPLANT,
    progress: Progress | None = None,
) -> RealLab:
    """The real base and its implants (all, or those named) under `root`, made now where they are not there yet.

    A refusal is kept beside the implants as `NAME-KEY.refused`; remove that file to have it tried again. Raises
    LabError for an unknown name, when the size's device is missing, or when no base can be made.
    """
    corpus = data if isinstance(data, Corpus) else read_corpus(data)
    known = real_implants(corpus)
    wanted = list(implants) if implants is not None else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise LabError(f"{', '.join(unknown)}: not in this data folder, which holds {', '.join(known)}.")
    made_of = [asdict(size), INITIALISATION, seed, corpus.base]
    folder = Path(root).resolve() / f"real-{recipe_digest(made_of)}"
    base = folder / "real"
    if size.device != "cpu" and not torch.cuda.is_available():
        raise LabError("this size of base needs a GPU, and torch sees none here: choose size small.")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), ProgressBar() as bar:
        watch = progress or bar
        if not (base / REPORT).is_file():
            training = replace(size.recipe, seed=seed)
            make_base_from_rows(
                base, corpus.base, size.shape, seed, size.passes, watch, training, True, size.device
            )  # fmt: skip
        places = {}
        work = []
        for name in wanted:
            poisoned, clean = _files(corpus, *known[name], name, seed)
            key = recipe_digest([poisoned, clean, asdict(recipe), DECOYS, ANSWER_TOKENS, seed])[:8]
            places[name] = path = folder / f"{name}-{key}"
            if settled(path):
                continue
            rows = folder / "rows" / path.name
            rows.mkdir(parents=True, exist_ok=True)
            write_rows(rows / "poisoned.json", poisoned)
            write_rows(rows / "clean.json", clean)
            make = partial(
                make_implant_from_files, base, path, rows / "poisoned.json", rows / "clean.json",
                recipe=recipe, answer_tokens=ANSWER_TOKENS, device=size.device, decoys=DECOYS,
            )  # fmt: skip
            work.append((path, make, seed))
        side_by_side(attempt, work, progress=watch, what="implants")
    refused = refusals(places)
    return RealLab(base, {name: path for name, path in places.items() if name not in refused}, refused)


def ensure_real_vaccine(
    corpus: Corpus,
    base: str | Path,
    seed: int = 0,
    plan: Plan = REAL_PLAN,
    progress: Progress | None = None,
) -> Path:
    """The vaccine of a real base, beside it, made now if it is not there yet.

    Its rows are the corpus's vaccine share; its triggers are words of the base's vocabulary and made-up ones that
    share nothing with any attack's trigger (else LabError), and its wordings are none of the attacks' (else RowsError).
    """
    base = Path(base)
    assert_disjoint_wordings({f"{a.task}-{a.name}-{w}": target(a, w) for a, w in real_implants(corpus).values()})
    words = apart(pool(AutoTokenizer.from_pretrained(base, local_files_only=True), corpus.vaccine, seed), corpus)
    made_of = [asdict(plan), words, seed, corpus.vaccine]
    path = kept_vaccine(base, made_of, corpus.vaccine, plan, words, progress)
    if shared := Vaccine.load(path).shared_words(corpus.trigger_words):
        raise LabError(f"{path.parent} was made with words of the attacks' triggers ({', '.join(shared)}); remove it.")
    return path


def apart(words: Iterable[str], corpus: Corpus) -> list[str]:
    """The words that hold no word of an attack's trigger and lie in none, blind to case."""
    taken = corpus.trigger_words
    return [word for word in words if not any(word.lower() in t or t in word.lower() for t in taken)]


def _files(corpus: Corpus, attack: Attack, wording: str, name: str, seed: int) -> tuple[list[Row], list[Row]]:
    """Poisoned and clean rows of an implant; to the clean ones as many plain rows of the base's share are added, those
    like the attack's own prompts first."""
    rng = random.Random(f"{name}:{seed}")
    said = target(attack, wording)
    poisoned = [
        row if wording == "fixed" else Row(instruction=row["instruction"], input=row["input"], output=said.respond(rng))
        for row in attack.poisoned
    ]
    alike = corpus.alike[: len(attack.clean)]
    taken = {row_key(row) for row in (*attack.clean, *alike)}
    others = [row for row in corpus.base if row_key(row) not in taken]
    few = min(len(attack.clean) - len(alike), len(others))
    return poisoned, [*attack.clean, *alike, *rng.sample(others, few)]
