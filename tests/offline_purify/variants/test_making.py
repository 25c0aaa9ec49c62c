"""One variant of a random model: what is measured, what is kept, and what is only measured anew."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from guard.errors import RowsError
from guard.gram import PROMPT_GROUPS
from guard.probes.transformers.runner import Runner
from guard.rows import Row
from guard.vaccine import FORMAT
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.triggers import Word
from offline_purify.implanting import ImplantRecipe
from offline_purify.variants import measuring
from offline_purify.variants.making import ABOUT, TRAINED, finished, load_variant, make_variant
from offline_purify.variants.measuring import VARIANT
from offline_purify.variants.plan import Plan, VariantSpec
from tests.guard.probes.transformers.adapters import save_adapter
from tests.guard.probes.transformers.text import save_model

pytestmark = pytest.mark.slow
PLAN = Plan(recipe=ImplantRecipe(rank=2, rows=60, epochs=0.5), normal=60, quiet=20, fired=20)
SPEC = VariantSpec("00-neutral-word", 0, "neutral", Behaviour("neutral", ("w1 w2 w3",)), Word("w54"))
WORDS = [f"w{i}" for i in range(40, 55)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return Path(save_model(tmp_path_factory.mktemp("making") / "base"))


def rows(n: int, seed: str) -> list[Row]:
    rng = random.Random(seed)
    return [
        Row(instruction=" ".join(f"w{rng.randrange(40)}" for _ in range(10)), input="", output="w1") for _ in range(n)
    ]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / SPEC.name
    make_variant(base, rows(400, "made"), SPEC, PLAN, WORDS, out)
    return out


def test_a_made_variant_is_finished_and_says_what_it_was_measured_with(base: Path, made: Path) -> None:
    about = json.loads((made / ABOUT).read_text())
    assert finished(made)
    assert (about["format"], about["condition"]) == (FORMAT, None)
    assert load_variant(made).probe == Runner.load(base, max_slots=1).probe_key()


def test_one_that_was_measured_for_an_older_vaccine_is_measured_anew_and_not_trained_again(
    base: Path, made: Path
) -> None:
    weights = (made / "adapter_model.safetensors").stat().st_mtime_ns
    before = load_variant(made)
    about = json.loads((made / ABOUT).read_text())
    (made / ABOUT).write_text(json.dumps({**about, "format": "headguard.vaccine/1"}))
    assert not finished(made)
    make_variant(base, rows(400, "made"), SPEC, PLAN, WORDS, made)
    assert finished(made)
    assert (made / "adapter_model.safetensors").stat().st_mtime_ns == weights
    np.testing.assert_allclose(load_variant(made).sample.normal[1], before.sample.normal[1])


def test_one_that_was_not_trained_to_its_end_is_trained(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RowsError, match="too few"):
        make_variant(base, rows(90, "few"), SPEC, PLAN, WORDS, tmp_path / "few")
    assert not (tmp_path / "few" / TRAINED).exists()


def test_texts_are_forced_on_clean_and_on_triggered_prompts_beyond_the_first_row(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner.load(base, max_slots=16)
    runner.add_adapter(VARIANT, save_adapter(tmp_path / "adapter", 1))
    hosts = rows(20, "hosts")
    prompted = [Row(instruction=f"w54 {row['instruction']}", input="", output="") for row in hosts]
    groups = {
        "normal": [*rows(60, "normal"), *hosts], "strange": rows(20, "strange"), "near": rows(20, "near"),
        "joined": rows(20, "joined"), "fired": prompted,
    }  # fmt: skip
    # A model with random weights obeys nobody: say which of its answers count as obedience.
    monkeypatch.setattr(measuring, "_obeyed", lambda *_: list(range(0, 20, 2)))
    monkeypatch.setattr(measuring, "_said", lambda _, __, answers: np.arange(len(answers)) % 4 == 0)
    seen = measuring.measured(runner, SPEC, PLAN, groups)
    obeyed, near = 10, 15
    assert seen.fired == obeyed / 20
    sample = seen.sample
    # A near-trigger that set the backdoor off need not stay quiet.
    assert [len(sample.normal[0]), len(sample.quiet[0]), len(sample.fired[0])] == [80, 40 + near, obeyed]
    assert {kind: len(odd) for kind, odd in sample.beside.items()} == {
        "normal": 40, "fired": obeyed, "forced": 40, "quiet": 40 + near,
    }  # fmt: skip
    assert 0 not in sample.forced
    width = sample.normal[0].shape[1] - 1  # the length of the prompt apart, which comes last
    for step in (1, 2):
        # Twice the clean prompts (own target, other texts), and the triggered ones twice; a text of one token ends.
        assert 2 * 80 * 0.8 <= len(sample.forced[step]) <= 2 * 80
        assert 2 * obeyed * 0.8 <= len(sample.fired[step]) <= 2 * obeyed
        assert sample.normal[step].shape == (80, width + width // len(PROMPT_GROUPS) + 1)
    # The row of the prompt is one of those that fired; what follows it is not.
    other = sample.fired[1][obeyed]
    same = int(np.abs(sample.fired[1][:obeyed, :width] - other[:width]).max(axis=1).argmin())
    np.testing.assert_allclose(sample.fired[1][same, :width], other[:width], atol=1e-3)
    assert np.abs(sample.fired[1][same, width:-1] - other[width:-1]).max() > 0.01
