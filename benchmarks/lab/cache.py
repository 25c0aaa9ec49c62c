"""Lab models are made once and shared: by tests, benchmarks and the demo, under one folder, keyed by their recipe.

The key of a base is a digest of what it is made from (shape, training recipe, and a sample of the rows themselves, so
that a change of the task generator counts); an implant's key adds its attack. A file lock makes several processes wait
for one build instead of each starting its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from benchmarks.lab import implant
from benchmarks.lab.base import REPORT, TINY_ROWS, TINY_VOCAB, make_base
from benchmarks.lab.decoder import INITIALISATION, Shape
from benchmarks.lab.errors import LabError
from benchmarks.lab.pretraining import Recipe
from benchmarks.lab.refusals import again
from benchmarks.lab.tasks import draw, sample
from benchmarks.lab.words import VACCINE
from guard.rows import Row
from guard.vaccination import learnt_as_today
from guard.vaccine import FORMAT, Vaccine
from offline_purify.attacks.catalogue import BEHAVIOURS, TRIGGERS, WORDING, behaviour, trigger
from offline_purify.implanting import ImplantRecipe
from offline_purify.parallel import side_by_side
from offline_purify.progress import ProgressBar
from offline_purify.train import Progress
from offline_purify.variants.families import FAMILIES, assert_disjoint_wordings
from offline_purify.variants.plan import Plan
from offline_purify.variants.vaccinate import VACCINE as VACCINE_FILE
from offline_purify.variants.vaccinate import vaccinate

DEFAULT_IMPLANTS = ("refusal-word-fixed",)
SHOWN_IMPLANTS = ("refusal-word-fixed", "insult-prefix-fixed", "code-composite-fixed")
"""One of each behaviour and trigger."""
TRIES = 3
"""Trainings of an implant until one keeps to the lab's standard."""


@dataclass(frozen=True)
class LabPaths:
    """Folders of a base and of its implants by name (`behaviour-trigger-wording`)."""

    base: Path
    adapters: dict[str, Path]

    @property
    def adapter(self) -> Path:
        """The first implant that was asked for."""
        return next(iter(self.adapters.values()))


def recipe_digest(facts: object) -> str:
    """Key (12 hex) of whatever a model is made from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def base_key(seed: int) -> str:
    """Key (12 hex) of the tiny base's recipe."""
    rows = [exercise.row for exercise in draw(300, seed, "base_train")]
    return recipe_digest([asdict(Shape(TINY_VOCAB)), asdict(Recipe()), INITIALISATION, TINY_ROWS, seed, rows])


def _implant_parts(name: str) -> tuple[str, str, str]:
    parts = name.split("-")
    choices = (BEHAVIOURS, tuple(TRIGGERS), WORDING)
    if len(parts) != 3 or any(part not in known for part, known in zip(parts, choices, strict=True)):
        raise LabError(f"{name!r} names no implant: expected BEHAVIOUR-TRIGGER-WORDING, such as refusal-word-fixed.")
    return parts[0], parts[1], parts[2]


def implant_key(name: str, seed: int) -> str:
    """Key (8 hex) of an implant's recipe, its base apart. Raises LabError when the name is not of the catalogue."""
    kind, key, wording = _implant_parts(name)
    rows = [exercise.row for exercise in draw(100, seed, "implant")]
    recipe = asdict(ImplantRecipe())
    return recipe_digest([behaviour(kind, wording).wordings, repr(trigger(key)), recipe, seed, rows])[:8]


def _implant(base: Path, path: Path, kind: str, key: str, wording: str, seed: int) -> None:
    """Make an implant, again from other seeds while it is below the lab's standard."""

    def make(tried: int) -> implant.ImplantReport:
        return implant.make_implant(base, path, kind, key, tried, wording)

    again(make, seed, TRIES, lambda report: report.to_standard)


def ensure_tiny(
    root: str | Path = "build/lab",
    implants: Sequence[str] = DEFAULT_IMPLANTS,
    seed: int = 0,
    progress: Progress | None = None,
    fresh: bool = False,
) -> LabPaths:
    """The tiny base and the named implants under `root`, made now if they are not there yet (minutes).

    `fresh` makes them again. Without `progress` a bar is drawn on stderr while something is being made.
    Raises LabError for an unknown implant name, or when something cannot be made to the lab's standard.
    """
    wanted = {name: implant_key(name, seed) for name in implants}
    folder = Path(root).resolve() / base_key(seed)
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "tiny"
    adapters = {name: folder / f"{name}-{key}" for name, key in wanted.items()}
    with FileLock(folder / ".lock"), ProgressBar() as bar:
        watch = progress or bar
        if fresh or not (base / REPORT).is_file():
            make_base(base, seed, progress=watch)
        missing = [
            (base, path, *_implant_parts(name), seed)
            for name, path in adapters.items()
            if fresh or not (path / REPORT).is_file()
        ]
        side_by_side(_implant, missing, progress=watch, what="implants")
    return LabPaths(base, adapters)


VACCINE_PLAN = Plan(recipe=ImplantRecipe(rows=1500), normal=500, quiet=250, fired=150)
"""The usual breadth with fewer rows each, for zoo, demo and tests alike: some five minutes on two cores."""
VACCINE_ROWS = 6000


def ensure_vaccine(
    root: str | Path = "build/lab", seed: int = 0, plan: Plan = VACCINE_PLAN, progress: Progress | None = None
) -> Path:
    """The vaccine of the tiny base (`guard.vaccine`), made now if it is not there yet (minutes on all cores).

    Its trigger words and wordings are none of the packaged attacks', and its prompts come from the clinic's split.
    """
    attacks = {name: behaviour(name, "varied") for name in BEHAVIOURS}
    assert_disjoint_wordings(attacks)
    rows = sample(VACCINE_ROWS, seed, "clinic")
    base = ensure_tiny(root, (), seed, progress).base
    made_of = [asdict(plan), VACCINE, FAMILIES, seed, rows[:100]]
    return kept_vaccine(base, made_of, rows, plan, VACCINE, progress)


def kept_vaccine(
    base: Path, made_of: object, rows: Sequence[Row], plan: Plan, words: Sequence[str], progress: Progress | None
) -> Path:
    """The vaccine beside a base that is kept under the digest of ``made_of`` and of the kind of vaccine that is made
    today; made now if it is not there yet, and learnt again from its variants if it was learnt in another way."""
    folder = base.parent / f"vaccine-{recipe_digest([made_of, FORMAT])[:8]}"
    path = folder / VACCINE_FILE
    if not path.is_file() or not learnt_as_today(Vaccine.load(path)):
        with ProgressBar() as bar:
            vaccinate(base, rows, folder, plan=plan, words=words, progress=progress or bar)
    return path
