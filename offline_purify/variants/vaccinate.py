"""From a base and clean rows to a vaccine: make the variants (in parallel, resumable), then let the guard learn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from filelock import FileLock
from transformers import AutoTokenizer

from guard.errors import RowsError
from guard.fitting import prompts_digest
from guard.identity import base_digest
from guard.rows import Row, row_key
from guard.vaccination import fit_vaccine
from guard.vaccine import Vaccine
from offline_purify.parallel import side_by_side
from offline_purify.train import Progress
from offline_purify.variants.making import finished, load_variant, make_variant
from offline_purify.variants.plan import Plan, VariantSpec, pool

VACCINE = "vaccine.safetensors"


def vaccinate(
    base: str | Path,
    rows: Sequence[Row],
    out: str | Path,
    *,
    plan: Plan = Plan(),
    words: Sequence[str] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Vaccine:
    """Implant the plan's variants in ``base`` and fit a vaccine on them; both are kept in the folder ``out``.

    ``rows`` are clean prompts that no later evaluation uses (a variant needs a few thousand); ``words`` replaces the
    pool that trigger words come from; ``jobs`` processes work at a time (default: one per processor). Variants that
    were finished earlier are reused. Raises RowsError for too few rows, or when no variant took,
    and CalibrationError when those that took fired too rarely to learn from.
    """
    base, out = Path(base), Path(out)
    unique = list({row_key(row): row for row in rows}.values())
    chosen = (
        list(words) if words else pool(AutoTokenizer.from_pretrained(base, local_files_only=True), unique, plan.seed)
    )
    specs = plan.specs(chosen)
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):
        missing = [
            (base, unique, spec, plan, chosen, out / spec.name) for spec in specs if not finished(out / spec.name)
        ]
        side_by_side(_make, missing, jobs, progress, "synthetic variants")
        made = [load_variant(out / spec.name) for spec in specs]
        took = [variant for variant in made if variant.took]
        if not any(variant.sample.fired for variant in took):
            raise RowsError(f"none of {len(specs)} variants learnt its behaviour: train longer or give more rows.")
        vaccine = fit_vaccine(
            [variant.sample for variant in took],
            progress=progress and partial(progress, "learning from them"),
            base=base_digest(base),
            probe=made[0].probe,
            facts={
                "seed": plan.seed,
                "prompts_sha256": prompts_digest(unique),
                "trigger_words": sorted({p for spec in specs if spec.trigger for p in spec.trigger.parts}),
                "families": sorted({spec.family for spec in specs}),
                "left_out": sorted(variant.sample.name for variant in made if not variant.took),
                "fired": {variant.sample.name: round(variant.fired, 3) for variant in made},
            },
        )
        vaccine.save(out / VACCINE)
    return Vaccine.load(out / VACCINE)


def _make(base: Path, rows: list[Row], spec: VariantSpec, plan: Plan, words: list[str], out: Path) -> None:
    make_variant(base, rows, spec, plan, words, out)
