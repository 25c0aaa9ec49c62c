"""The steps of one repair, each reading files and writing files under OUT/work, so that any of them can be run again.

A `RepairSteps` holds no truth of its own: the suspect it opened is only a cache, and every step starts by putting the
suspect (an adapter, or a whole model) into the state that its input files name. A step killed half-way leaves nothing
but a ``.partial`` file. What a step returns is small, JSON-able and free of prompt text, because the durable workflow
stores it in a database.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from guard.errors import GuardError, RowsError
from guard.identity import adapter_digest, base_digest, revision_name
from guard.profile import file_digest
from guard.rows import Row, assert_disjoint, read_rows, row_key, rows_digest, split
from offline_purify.answers import greedy_answers
from offline_purify.calibration import calibrate_candidate
from offline_purify.candidates import Candidate, find_candidates, user_text
from offline_purify.controls import clean_finetuning, random_channels, random_heads
from offline_purify.countertraining import counter_train
from offline_purify.evaluation import Exam, Sitting, set_exam, sit
from offline_purify.flags import KINDS, Flag, assert_flags_disjoint, behaviour_of, read_flags, split_flags
from offline_purify.full_model import is_adapter, open_model
from offline_purify.heads.stage import repair_heads
from offline_purify.references import compare
from offline_purify.rescoring import Rescoring
from offline_purify.signature.find import find_signature
from offline_purify.signature.score import Signature
from offline_purify.signature.stage import repair_signature
from offline_purify.spec import RepairSpec
from offline_purify.stage import Material, References, Stage, StageResult
from offline_purify.suspect import Suspect

STAGES: Mapping[str, Stage] = MappingProxyType(
    {"signature": repair_signature, "heads": repair_heads, "counter": counter_train}
)
"""The registry: a later method joins by its function here and its name in ``spec.STAGE_NAMES``."""

SPLITS = (0.35, 0.40, 0.25)
"""Train, calibration, evaluation shares of the clean rows: a profile needs the most."""
CONFIRM_ROWS = 24
LOCATED_FLAGS = 24
"""Flags that the guard is asked about again, once for each of their words; others keep the spans of their verdicts."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _digest_of(folder: Path) -> str:
    return adapter_digest(folder) if is_adapter(folder) else base_digest(folder)


def _as_row(flag: Flag) -> Row:
    return Row(instruction=user_text(flag), input="", output="")


class RepairSteps:
    """The steps of ``spec``. Methods ending in a dict are steps; ``close`` forgets the loaded model."""

    def __init__(self, spec: RepairSpec, progress: Callable[[str, int, int], None] | None = None) -> None:
        self.spec, self.progress = spec, progress
        self._suspect: Suspect | None = None
        self._original: dict[str, Any] = {}

    def close(self) -> None:
        """Forget the loaded model."""
        self._suspect, self._original = None, {}

    def suspect(self, state: str = "before") -> Suspect:
        """The suspect in ``state`` ("before": as it came)."""
        if self._suspect is None:
            self._suspect = self._opened()
            self._original = self._suspect.state()
        if state == "before":
            self._suspect.restore(self._original)
        else:
            self._suspect.load_state(self._state_file(state))
        return self._suspect

    def _opened(self) -> Suspect:
        spec = self.spec
        if spec.adapter is None:
            return open_model(spec.base, spec.reference_folder, spec.device)
        return Suspect.open(spec.base, spec.adapter, spec.reference_folder, spec.device)

    def _state_file(self, state: str) -> Path:
        return self.spec.work / "states" / f"{state}.safetensors"

    def _rows(self, part: str) -> list[Row]:
        rows: list[Row] = read_json(self.spec.work / "rows.json")[part]
        return rows

    def _flags(self, part: str) -> list[Flag]:
        return [Flag.from_dict(f) for f in read_json(self.spec.work / "flags.json")[part]]

    def _keep_flags(self, trained: Sequence[Flag], held: Sequence[Flag]) -> None:
        parts = {"train": trained, "held": held}
        write_json(self.spec.work / "flags.json", {name: [f.to_dict() for f in part] for name, part in parts.items()})

    def _candidates(self) -> list[Candidate]:
        return [Candidate.from_dict(c) for c in read_json(self.spec.work / "candidates.json")]

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = read_json(self.spec.work / "facts.json")
        return facts

    def prepare(self) -> dict[str, Any]:
        """Check everything that came in, split it, prove the splits disjoint, and record its digests."""
        spec = self.spec
        flags, rows = read_flags(spec.flags), read_rows(spec.clean)
        spec.work.mkdir(parents=True, exist_ok=True)
        os.chmod(spec.work, 0o700)
        suspect = self.suspect()
        flagged = {row_key(_as_row(f)) for f in flags}
        free = [r for r in rows if row_key(r) not in flagged]
        if spec.calibrate:
            train, calibration, evaluation = split(free, SPLITS, spec.seed)
        else:
            (train, evaluation), calibration = split(free, (0.6, 0.4), spec.seed), []
        kept = {
            "train": train[: spec.most_clean_train],
            "calibration": calibration[: spec.most_calibration],
            "evaluation": evaluation[: spec.most_clean_evaluation],
        }
        trained, held = split_flags(flags[: spec.most_flags], spec.heldout_share, spec.seed)
        assert_flags_disjoint(trained, held)
        assert_disjoint(**kept, flags=[_as_row(f) for f in flags])
        longest = max((len(suspect.tokenizer(r["output"])["input_ids"]) for r in train), default=24)
        facts = {
            "base": base_digest(spec.base),
            "adapter": adapter_digest(spec.adapter) if spec.adapter is not None else None,
            "flags": file_digest(spec.flags),
            "reference": _digest_of(spec.reference_folder) if spec.reference_folder is not None else spec.reference,
            "clean": rows_digest(spec.clean),
            "max_new_tokens": spec.max_new_tokens or min(longest, 64) + 8,
            "rows": {name: len(part) for name, part in kept.items()},
            "rows_dropped_as_flagged": len(rows) - len(free),
            "flags_train": len(trained),
            "flags_heldout": len(held),
            "seed": spec.seed,
            "layout": asdict(suspect.layout),
            "target_modules": list(suspect.target_modules),
        }
        write_json(spec.work / "rows.json", kept)
        self._keep_flags(trained, held)
        write_json(spec.work / "facts.json", facts)
        return {"rows": facts["rows"], "flags_train": len(trained), "flags_heldout": len(held)}

    def answer(self) -> dict[str, Any]:
        """Answer flags and clean rows with the suspect and with the reference (or what stands in for one), and sort the
        flags."""
        case = compare(
            self.suspect(),
            self._flags("train"),
            self._flags("held"),
            self._rows("train"),
            self._rows("evaluation"),
            self._facts()["max_new_tokens"],
            self.spec.seed,
            self.progress,
        )
        work, flags = self.spec.work, [*case.trained, *case.held]
        self._keep_flags(case.trained, case.held)
        write_json(
            work / "references.json", {"train": case.train, "evaluation": case.evaluation, "whose": case.references}
        )
        return {**{kind: sum(f.kind == kind for f in flags) for kind in KINDS}, "references": case.references}

    def references(self) -> References:
        """Whose answers flags and clean rows are set against, once ``answer`` is done."""
        if self.spec.has_reference:
            return "trusted"
        whose: References = read_json(self.spec.work / "references.json")["whose"]
        return whose

    def candidates(self) -> dict[str, Any]:
        """Propose trigger candidates from the training flags and confirm them by re-insertion into clean rows.

        With a profile that fits, proposals come from the words that the flags hang on, and each also says how often the
        guard flags it; one that does not fit stops no repair.
        """
        suspect, n = self.suspect(), self._facts()["max_new_tokens"]
        flags = [f for f in self._flags("train") if f.kind == "true"]
        train = self._rows("train")
        references = read_json(self.spec.work / "references.json")["train"][:CONFIRM_ROWS]

        def ask(prompts: list[list[int]]) -> list[str]:
            return greedy_answers(
                suspect.model, suspect.tokenizer, prompts, n, progress=self.progress, what="trying trigger candidates"
            )

        guard, unwatched = None, None
        if self.spec.profile is not None:
            try:
                guard = Rescoring(
                    self.spec.base, self.spec.adapter, self.spec.profile, self.spec.alpha, self.spec.device
                )
            except GuardError as error:
                unwatched = str(error)
        if guard is not None:
            flags = [*map(guard.located, flags[:LOCATED_FLAGS]), *flags[LOCATED_FLAGS:]]
        found = find_candidates(
            suspect.tokenizer,
            flags,
            train[: len(references)],
            references,
            train,
            behaviour_of(flags),
            ask,
            self.spec.seed,
            guard.flags if guard is not None else None,
        )
        write_json(self.spec.work / "candidates.json", [c.to_dict() for c in found])
        return {"tried": len(found), "confirmed": sum(c.confirmed for c in found), "unwatched": unwatched}

    def signature(self) -> dict[str, Any]:
        """Find the signature of the suspect as it came: the long part of its stage, kept for every pipeline that
        silences it."""
        began = time.monotonic()
        try:
            found = find_signature(self.suspect(), self._material())
        except RowsError as error:
            return self._told("signature", StageResult("signature", False, str(error), {}, time.monotonic() - began))
        found.save(self._signature_file)
        return {"ok": True, "learnt": len(found.told["variants"])}

    @property
    def _signature_file(self) -> Path:
        return self.spec.work / "signature.safetensors"

    def _material(self) -> Material:
        flags, signature = self._flags("train"), self._signature_file
        return Material(
            flags=tuple(flags),
            behaviour=behaviour_of(flags),
            clean=tuple(self._rows("train")),
            candidates=tuple(c for c in self._candidates() if c.confirmed),
            seed=self.spec.seed,
            max_new_tokens=self._facts()["max_new_tokens"],
            progress=self.progress,
            references=self.references(),
            signature=Signature.load(signature) if signature.is_file() else None,
        )

    def stage(self, name: str, start: str = "before") -> dict[str, Any]:
        """Run one repair stage from state ``start``; on success its state is kept under ``start+name`` (or
        ``name``)."""
        label = name if start == "before" else f"{start}+{name}"
        suspect = self.suspect(start)
        result = STAGES[name](suspect, self._material())
        if result.ok:
            suspect.save_state(self._state_file(label))
        return self._told(label, result)

    def _told(self, label: str, result: StageResult) -> dict[str, Any]:
        write_json(self.spec.work / "stages" / f"{label}.json", {**asdict(result), "label": label})
        return {"label": label, "ok": result.ok, "reason": result.reason, "seconds": round(result.seconds, 2)}

    def control(self, name: str) -> dict[str, Any]:
        """Run one same-budget control ("clean_only", "random_heads" or "random_channels") from the suspect as it came;
        keeps its state."""
        suspect, began = self.suspect(), time.monotonic()

        def details(stage: str) -> dict[str, Any] | None:
            path = self.spec.work / "stages" / f"{stage}.json"
            found: dict[str, Any] | None = read_json(path)["details"] if path.is_file() else None
            return found

        label = f"control_{name}"
        if name == "clean_only":
            counter = details("counter")
            clean_finetuning(suspect, self._material(), counter if counter and "examples" in counter else None)
        elif name == "random_channels":
            attempts = (details("signature") or {}).get("attempts")
            if not attempts:
                return {"label": label, "ok": False, "reason": "the signature stage silenced nothing", "seconds": 0.0}
            random_channels(suspect, self._material(), attempts[-1]["ratio"])
        else:
            heads = details("heads")
            if not heads or not any("trace" in a for a in heads.get("attempts", [])):
                return {"label": label, "ok": False, "reason": "the heads stage aligned nothing", "seconds": 0.0}
            random_heads(suspect, self._material(), heads)
        suspect.save_state(self._state_file(label))
        return {"label": label, "ok": True, "reason": None, "seconds": round(time.monotonic() - began, 2)}

    def exam(self) -> Exam:
        """The evaluation's prompts, made from held-out flags and evaluation rows only."""
        held = self._flags("held")
        every = [*self._flags("train"), *held]
        tokenizer = self.suspect().tokenizer
        return set_exam(
            tokenizer,
            held,
            self._rows("evaluation"),
            read_json(self.spec.work / "references.json")["evaluation"],
            self._candidates(),
            behaviour_of(every),
            self._facts()["max_new_tokens"],
            self.spec.seed,
        )

    def evaluate(self, label: str) -> dict[str, Any]:
        """Let state ``label`` sit the exam ("before", "reference", a pipeline or a control)."""
        began = time.monotonic()
        exam = self.exam()
        suspect = self.suspect("before" if label == "reference" else label)
        if label == "reference":
            with suspect.reference():
                sitting = sit(exam, suspect, self.progress, f"evaluating {label}")
        else:
            sitting = sit(exam, suspect, self.progress, f"evaluating {label}", self._original)
        write_json(self.spec.work / "sittings" / f"{label}.json", sitting.to_dict())
        return {"label": label, "seconds": round(time.monotonic() - began, 2)}

    def sitting(self, label: str) -> Sitting:
        """What ``evaluate`` wrote."""
        return Sitting(**read_json(self.spec.work / "sittings" / f"{label}.json"))

    def save_candidate(self, label: str) -> dict[str, Any]:
        """Write the repaired suspect of state ``label`` as a folder of its own kind (PEFT's, or a model's),
        OUT/candidate."""
        folder = self.spec.out / "candidate"
        self.suspect(label).save(folder)
        digest = _digest_of(folder)
        return {"candidate": str(folder), "digest": digest, "revision": revision_name(self.spec.name, digest)}

    def calibrate(self) -> dict[str, Any]:
        """Fit the candidate's guard profile on the calibration rows, OUT/profile.safetensors."""
        path, candidate = self.spec.out / "profile.safetensors", self.spec.out / "candidate"
        whole = self.spec.adapter is None
        return {"profile": str(path)} | calibrate_candidate(
            candidate if whole else self.spec.base,
            None if whole else candidate,
            self._rows("calibration"),
            path,
            alpha=self.spec.alpha,
            seed=self.spec.seed,
            vaccine=self.spec.vaccine,
            like=self.spec.profile,
            device=self.spec.device,
            progress=self.progress,
        )
