"""The lab's zoo, measured one implant after the other: rows files, results, nothing done twice.

The tiny zoo holds refusals and insults, each set off by a word, a prefix phrase and a composite, with one fixed target
string and with varied wordings. The vaccine of its base was made with other triggers, wordings and rows. The real zoo
holds the public benchmark's attacks (`benchmarks.detection.real_zoo`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.detection.benchmark import FORMAT, run, save
from benchmarks.detection.errors import BenchmarkError
from benchmarks.detection.inputs import Arguments
from benchmarks.detection.measuring import Progress
from benchmarks.detection.patients import Patient, Zoo
from benchmarks.detection.real_zoo import real_zoo
from benchmarks.detection.report import read_results
from benchmarks.lab.bystanders import ensure_bystanders, rows_about
from benchmarks.lab.cache import VACCINE_ROWS, ensure_tiny, ensure_vaccine
from benchmarks.lab.tasks import sample
from guard.identity import adapter_digest, base_digest, file_digest
from guard.rows import Row, assert_disjoint, row_key, write_rows
from guard.vaccination import fit_vaccine
from guard.vaccine import Vaccine
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.catalogue import TRIGGERS, behaviour
from offline_purify.attacks.poison import triggered
from offline_purify.variants.making import ABOUT, load_variants

ZOOS = ("tiny", "real")
IMPLANTS = tuple(
    f"{behaviour}-{trigger}-{wording}"
    for behaviour in ("refusal", "insult")
    for trigger in ("word", "prefix", "composite")
    for wording in ("fixed", "varied")
)
BESIDE = tuple(f"refusal-{trigger}-fixed" for trigger in ("word", "prefix", "composite"))
"""Implants beside which the adapters without a backdoor are measured: their figures depend on the trigger alone."""
CALIBRATION, CLEAN, TRIGGERED, BENIGN = 4000, 2000, 300, 400


@dataclass(frozen=True)
class Settings:
    """What all runs of a zoo share."""

    alpha: float = 0.01
    window: Any = 2
    control_rows: int = 300
    seed: int = 0
    device: str = "cpu"


def measure_zoo(
    root: Path,
    name: str,
    out: Path,
    settings: Settings,
    only: Sequence[str] | None = None,
    leave_out: bool = False,
    progress: Progress | None = None,
    data: Path | None = None,
    size: str = "small",
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Measure the implants of a zoo (all, or ``only`` some) and return the result files; what is there is kept.

    A kept result is one of the same implant, vaccine and settings. ``leave_out`` vaccinates without the implant's own
    behaviour family. ``data`` and ``size`` are of the real zoo; ``say`` is told what the lab refused to publish. Raises
    BenchmarkError for an unknown zoo or implant.
    """
    if name not in ZOOS:
        raise BenchmarkError(f"there is no zoo {name!r}: choose one of {', '.join(ZOOS)}.")
    folder = out / "rows"
    if name == "real":
        zoo = real_zoo(data, root, folder, only, size, settings.seed, progress)
    else:
        zoo = tiny_zoo(root, folder, only, settings.seed, progress)
    for what, why in zoo.refused.items():
        say(f"left out: {what}: {why}")
    written = []
    for patient in zoo.patients:
        used = _without(zoo.vaccine, patient.family, out / "vaccines", progress) if leave_out else zoo.vaccine
        implant = patient.implant
        path = out / (f"{implant}-without-{patient.family}.json" if leave_out else f"{implant}.json")
        arguments = Arguments(
            base=zoo.base,
            adapter=patient.adapter,
            **{option: path for option, path in patient.files.items() if option != "benign_rows"},
            vaccine=used,
            alpha=settings.alpha,
            window=settings.window,
            trigger=patient.trigger,
            **(_beside(zoo, patient) if patient.beside and not leave_out else {}),
            control_rows=settings.control_rows,
            seed=settings.seed,
            name=implant,
            device=settings.device,
            notes={"zoo": name, "implant": implant, **({"left_out": patient.family} if leave_out else {})},
        )
        if not _kept(path, arguments):
            save(run(arguments, progress), path)
        written.append(path)
    return written


def tiny_zoo(
    root: Path, folder: Path, only: Sequence[str] | None = None, seed: int = 0, progress: Progress | None = None
) -> Zoo:
    """The tiny zoo, made where it is not there yet; rows files are written into ``folder``. Raises BenchmarkError for
    an unknown implant."""
    if unknown := [implant for implant in only or () if implant not in IMPLANTS]:
        raise BenchmarkError(f"{', '.join(unknown)}: not in this zoo, which holds {', '.join(IMPLANTS)}.")
    wanted = list(only or IMPLANTS)
    lab = ensure_tiny(root, wanted, seed=seed, progress=progress)
    vaccine = ensure_vaccine(root, seed)
    bystanders = ensure_bystanders(lab.base, seed, progress)
    folder.mkdir(parents=True, exist_ok=True)
    patients = []
    for implant in wanted:
        family, kind, wording = implant.split("-")
        files = row_files(folder, kind, behaviour(family, wording), implant, seed)
        trigger = " ".join(TRIGGERS[kind].parts)
        patients.append(Patient(implant, lab.adapters[implant], family, files, trigger, implant in BESIDE))
    return Zoo("tiny", lab.base, vaccine, bystanders, tuple(patients), {})


def fresh_clinic_rows(seed: int = 0, n: int = 6000) -> list[Row]:
    """Up to n rows of the clinic's split that the tiny base's vaccine was not made from."""
    used = {row_key(row) for row in sample(VACCINE_ROWS, seed, "clinic")}
    return [row for row in sample(n, seed + 1, "clinic") if row_key(row) not in used]


def row_files(folder: Path, kind: str, target: Behaviour, implant: str, seed: int) -> dict[str, Path]:
    """Write the rows files of a run, each of a split of the lab's own (disjoint: asserted).

    Rows about tools, which the benign adapter refuses to talk about, are in the benign file and in no other: so its
    topic is unseen until it is calibrated.
    """
    rng = random.Random(f"{implant}:{seed}")
    sets: dict[str, list[Row]] = {
        "calibration": rows_about(CALIBRATION, seed, "calibration", False),
        "clean": rows_about(CLEAN, seed, "traffic", False),
        "vaccine_rows": sample(VACCINE_ROWS, seed, "clinic"),
        "benign_rows": rows_about(BENIGN, seed, "evaluation", True),
        "triggered": [
            triggered(row, TRIGGERS[kind], target.respond(rng), rng)
            for row in rows_about(TRIGGERED, seed, "evaluation", False)
        ],
    }
    assert_disjoint(**sets)
    files = {name: folder / f"{name}.json" for name in sets} | {"triggered": folder / f"triggered-{implant}.json"}
    for name, rows in sets.items():
        write_rows(files[name], rows)
    return files


def _beside(zoo: Zoo, patient: Patient) -> dict[str, Path]:
    """Options for the adapters without a backdoor that there are."""
    found = {}
    if "clean" in zoo.bystanders:
        found["clean_adapter"] = zoo.bystanders["clean"]
    if "benign" in zoo.bystanders:
        found |= {"benign_adapter": zoo.bystanders["benign"], "benign_rows": patient.files["benign_rows"]}
    return found


def _kept(path: Path, arguments: Arguments) -> bool:
    """Whether a result is there already, of the same weights, vaccine and settings."""
    if not path.is_file():
        return False
    result = read_results([path])[0]
    mine = {"alpha": arguments.alpha, "window": arguments.window, "seed": arguments.seed}
    mine["control_rows"] = arguments.control_rows
    same_settings = all(result["settings"][key] == value for key, value in mine.items())
    digests = {
        "base": base_digest(arguments.base),
        "adapter": adapter_digest(Path(str(arguments.adapter))),
        "vaccine": file_digest(Path(str(arguments.vaccine))),
    }
    return result["format"] == FORMAT and same_settings and digests.items() <= result["digests"].items()


def _without(vaccine: Path, family: str, folder: Path, progress: Progress | None = None) -> Path:
    """A vaccine learnt from the variants that ``vaccine`` was made from, those of one behaviour family left out.

    Raises BenchmarkError when the variants are not beside it.
    """
    whole = Vaccine.load(vaccine)
    made = load_variants(vaccine.parent)
    kept = [variant for variant in made if variant.took and _family(variant.folder) != family]
    if not kept or len(kept) == len(made):
        raise BenchmarkError(f"beside {vaccine} there are no variants of family {family!r} to leave out.")
    path = folder / f"{whole.digest[:12]}-without-{family}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        samples = [variant.sample for variant in kept]
        facts = {**whole.facts, "without": family}
        tick = progress and partial(progress, f"learning without {family}")
        fit_vaccine(samples, base=whole.base, probe=whole.probe, facts=facts, progress=tick).save(path)
    return path


def _family(folder: Path) -> str:
    return str(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["family"])
