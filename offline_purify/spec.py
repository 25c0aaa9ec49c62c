"""What a repair is asked to do and what came of it: two typed, JSON-able objects that name paths, never prompt text.

They are the inputs and outputs of the durable workflow, whose database must hold no prompt; so everything here is a
path, an identifier, a number or a sentence of ours. Importing this module loads neither torch nor dbos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from guard.identity import check_name
from offline_purify.gate import GateResult, GateSettings

STAGE_NAMES = ("signature", "heads", "counter")
Status = Literal["offered", "refused", "failed"]


class RepairSpec(BaseModel):
    """One repair. ``flags`` is the case's JSONL file, ``clean`` a file or folder of rows, ``out`` a folder to write
    to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Path = Field(description="folder of the adapter's base or, without an adapter, of the suspicious whole model")
    adapter: Path | None = Field(default=None, description="folder of the suspicious adapter; none: `base` is repaired")
    flags: Path
    clean: Path
    out: Path
    reference: Literal["base"] | Path | None = Field(
        default=None,
        validate_default=True,
        description="who answers flags: for an adapter its base, unless the folder of a good adapter is named; for a "
        "whole model nobody, unless the folder of a trusted one, or of an adapter over it, is named",
    )
    stages: tuple[str, ...] = Field(
        default=STAGE_NAMES, description="repair stages to try, each alone and in this order together"
    )
    name: str = Field(
        default_factory=lambda given: "model" if given.get("adapter") is None else "adapter",
        description="name of the adapter or model, for the revision of the candidate",
    )
    seed: int = 0
    gate: GateSettings = GateSettings()
    alpha: float = Field(default=0.05, gt=0, lt=1, description="false-alarm rate the candidate's profile must support")
    profile: Path | None = Field(
        default=None, description="profile of the suspicious revision: tells whether the guard sees trigger candidates"
    )
    vaccine: Path | None = Field(
        default=None, description="vaccine of the base, for the profile of a candidate that is an adapter"
    )
    calibrate: bool = Field(default=True, description="fit a guard profile for the candidate on held-out clean rows")
    await_decision: bool = Field(
        default=False, description="the durable workflow waits for an operator's decision at its end"
    )
    decision_timeout_s: float = Field(default=7 * 86400.0, gt=0)
    redact: bool = Field(default=True, description="replace prompt and answer texts in the report by their lengths")
    keep_work: bool = Field(
        default=False,
        description="keep OUT/work, which holds prompts and answers, and a state for each repair and control that was "
        "tried: of a whole model each is as large as the model in fp32",
    )
    controls: bool = Field(default=True, description="also run the same-budget controls (they are never offered)")
    device: str = "cpu"
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="length of evaluation answers; default from the clean rows"
    )
    heldout_share: float = Field(default=0.4, gt=0, lt=1, description="share of flags that are held out from training")
    most_flags: int = Field(default=120, ge=2, description="flags used at most; a flood must not cost a night")
    most_clean_train: int = Field(default=1000, ge=1)
    most_clean_evaluation: int = Field(default=200, ge=1)
    most_calibration: int = Field(default=800, ge=1)

    @field_validator("base", "adapter", "flags", "clean", "out", "reference", "profile", "vaccine")
    @classmethod
    def _absolute(cls, path: Path | str | None) -> Path | str | None:
        return path.absolute() if isinstance(path, Path) else path  # a resumed repair may run in another folder

    @field_validator("reference")
    @classmethod
    def _somebody_else(cls, reference: Path | str | None, info: ValidationInfo) -> Path | str | None:
        if "adapter" not in info.data:
            return reference  # refused already
        if info.data["adapter"] is not None:
            return reference or "base"
        if reference == "base":
            raise ValueError(
                "a whole model has no base that could answer for it: name the folder of a trusted model, or nobody"
            )
        return reference

    @field_validator("vaccine")
    @classmethod
    def _fitting_vaccine(cls, vaccine: Path | None, info: ValidationInfo) -> Path | None:
        if vaccine is not None and "adapter" in info.data and info.data["adapter"] is None:
            raise ValueError(
                "a vaccine holds for the weights that it was made of, which the repair of a whole model changes: leave "
                "it out, and vaccinate the repaired model"
            )
        return vaccine

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [s for s in stages if s not in STAGE_NAMES]
        if unknown or not stages or len(set(stages)) != len(stages):
            raise ValueError(f"stages must be distinct and among {', '.join(STAGE_NAMES)}; got {list(stages)}")
        return stages

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str) -> str:
        return check_name(name)

    @property
    def reference_folder(self) -> Path | None:
        """The folder of who answers flags, where it is not an adapter's own base."""
        return self.reference if isinstance(self.reference, Path) else None

    @property
    def has_reference(self) -> bool:
        """Whether somebody trusted answers flags."""
        return self.reference is not None

    @property
    def work(self) -> Path:
        """Where the steps keep their files (mode 700; removed at the end unless ``keep_work``)."""
        return self.out / "work"


class RepairResult(BaseModel):
    """How a repair ended. ``offered``: passed the gate. ``refused``: measured and found wanting, or nothing to repair.
    ``failed``: no stage produced a repaired state."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Status
    reasons: list[str] = []
    revision: str | None = None
    pipeline: list[str] = []
    candidate: str | None = None
    profile: str | None = None
    report: str | None = None
    gate: GateResult | None = None
    summary: dict[str, Any] = {}
    seconds: float = 0.0
    decision: str | None = None
