"""What a repair can be asked for: an adapter or a whole model, and who may answer for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from offline_purify.spec import RepairSpec

GIVEN = {"base": Path("base"), "flags": Path("flags.jsonl"), "clean": Path("clean.json"), "out": Path("out")}


def spec(**changes: Any) -> RepairSpec:
    return RepairSpec.model_validate(GIVEN | changes)


def test_an_adapters_base_answers_unless_a_good_adapter_is_named() -> None:
    for said in ({}, {"reference": None}, {"reference": "base"}):
        asked = spec(adapter=Path("lora"), **said)
        assert (asked.reference, asked.reference_folder, asked.has_reference) == ("base", None, True)
    assert spec(adapter=Path("lora"), reference="good").reference_folder == Path("good").absolute()


def test_nobody_answers_for_a_whole_model_unless_somebody_is_named() -> None:
    assert (spec().reference, spec().has_reference) == (None, False)
    trusted = spec(reference="trusted")
    assert (trusted.reference_folder, trusted.has_reference) == (Path("trusted").absolute(), True)


def test_a_whole_model_has_no_base_to_ask() -> None:
    with pytest.raises(ValidationError, match="a whole model has no base that could answer"):
        spec(reference="base")


def test_a_vaccine_fits_an_adapters_candidate_and_no_whole_model() -> None:
    assert spec(adapter=Path("lora"), vaccine=Path("vaccine.safetensors")).vaccine is not None
    with pytest.raises(ValidationError, match="vaccinate the repaired model"):
        spec(vaccine=Path("vaccine.safetensors"))


def test_a_candidate_is_named_for_what_it_is() -> None:
    assert (spec().name, spec(adapter=Path("lora")).name, spec(name="support").name) == ("model", "adapter", "support")


@pytest.mark.parametrize("changes", [{}, {"reference": "trusted"}, {"adapter": Path("lora")}])
def test_a_spec_comes_back_from_the_database_as_it_went_in(changes: dict[str, Any]) -> None:
    asked = spec(**changes)
    assert RepairSpec.model_validate(asked.model_dump(mode="json")) == asked
