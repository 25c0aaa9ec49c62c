"""The signature stage on the patient: what it silences, what it puts back, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guard.errors import RowsError
from guard.rows import read_rows
from offline_purify.flags import behaviour_of, read_flags, sort_flags
from offline_purify.signature.find import find_signature
from offline_purify.signature.score import Signature, select
from offline_purify.signature.stage import SignatureConfig, chosen, repair_signature, silence
from offline_purify.signature.suppress import channel_slices
from offline_purify.stage import Material
from offline_purify.suspect import Suspect
from tests.offline_purify.patient import TARGET, Patient

CONFIG = SignatureConfig()


def planted(suspect: Suspect, variants: int = 3) -> Signature:
    """A signature whose channels move as much as the suspect's own adapter moves them, for every variant alike."""
    layout = suspect.layout
    lengths = torch.zeros(layout.layers, 128)
    for name, stakes in channel_slices(suspect.parameters()).items():
        for stake in stakes:
            lengths[stake.layer] += suspect.parameters()[name].detach().pow(2).sum(1 - stake.dimension)
    grams = lengths[:, None, None].expand(-1, variants, variants, -1)
    return Signature(grams, torch.ones(layout.layers, variants, variants, layout.heads), {"variants": ["a", "b", "c"]})


@pytest.fixture
def material(patient: Patient, suspect: Suspect) -> Material:
    flags = read_flags(patient.flags)
    done = sort_flags(flags, [TARGET] * len(flags), ["w1"] * len(flags), [("w1", "w1")])
    return Material(tuple(done), behaviour_of(done), tuple(read_rows(patient.clean)), (), 0, 6)


def test_channels_that_were_chosen_are_the_bases_again_before_recovery(suspect, material):
    signature = planted(suspect)
    config = replace(CONFIG, recovery=replace(CONFIG.recovery, max_steps=1, lr=0.0))
    before = suspect.state()
    told = silence(suspect, material, config, signature, 0.35)
    mask = select(signature.scores()[0].of(), 0.35, config.scope, config.cap)
    assert told["by_layer"] == mask.sum(1).tolist()
    for name, stakes in channel_slices(suspect.parameters()).items():
        value = suspect.parameters()[name].detach()
        for layer, dimension in ((stake.layer, stake.dimension) for stake in stakes):
            assert value.index_select(dimension, mask[layer].nonzero().flatten()).abs().sum() == 0
            kept = (~mask[layer]).nonzero().flatten()
            assert torch.equal(value.index_select(dimension, kept), before[name].index_select(dimension, kept))


def test_random_channels_are_as_many_in_every_layer_and_none_is_none(suspect):
    scores, _ = planted(suspect).scores()
    mask = chosen(scores, 0.35, CONFIG, 0)
    drawn = chosen(scores, 0.35, replace(CONFIG, choice="random"), 0)
    assert drawn.sum(1).tolist() == mask.sum(1).tolist()
    assert not torch.equal(drawn, mask)
    assert not chosen(scores, 0.35, replace(CONFIG, choice="none"), 0).any()


def test_a_stage_that_does_not_end_the_behaviour_leaves_the_adapter_bitwise_alone(suspect, material):
    before = suspect.state()
    config = replace(CONFIG, ratios=(0.01, 0.02), recovery=replace(CONFIG.recovery, max_steps=2))
    result = repair_signature(suspect, replace(material, signature=planted(suspect)), config)
    assert not result.ok
    assert [a["ratio"] for a in result.details["attempts"]] == [0.01, 0.02]
    assert "2%" in (result.reason or "")
    assert all(torch.equal(before[name], value) for name, value in suspect.state().items())


def test_a_stage_keeps_the_first_share_that_is_enough(suspect, material):
    config = replace(CONFIG, fires_max=1.0, perplexity_max=100.0, recovery=replace(CONFIG.recovery, max_steps=2))
    result = repair_signature(suspect, replace(material, signature=planted(suspect)), config)
    assert result.ok
    assert result.details["chosen"] == 0
    assert len(result.details["attempts"]) == 1


def test_a_model_that_cannot_say_the_synthetic_targets_has_no_signature(suspect, material):
    with pytest.raises(RowsError, match=r"none of 6 synthetic backdoors was learnt .*0%"):
        find_signature(suspect, material)


def test_what_was_found_is_read_back_as_it_was(suspect, tmp_path: Path):
    signature = planted(suspect)
    signature.save(tmp_path / "work" / "signature.safetensors")
    again = Signature.load(tmp_path / "work" / "signature.safetensors")
    assert torch.equal(again.channels, signature.channels)
    assert again.told == signature.told
    assert signature.of_first(2).channels.shape[1:3] == (2, 2)
