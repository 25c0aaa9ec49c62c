"""Which variants are planned, and that they share nothing with the attacks they must help to find."""

from collections import Counter

import pytest

from benchmarks.lab.words import VACCINE
from guard.errors import RowsError
from guard.rows import Row
from offline_purify.attacks.behaviours import Behaviour
from offline_purify.attacks.catalogue import BEHAVIOURS, TRIGGERS, behaviour
from offline_purify.variants.families import FAMILIES, assert_disjoint_wordings
from offline_purify.variants.plan import Plan, pool
from tests.offline_purify.patient import TARGET, tokenizer


def test_eighteen_variants_hold_every_family_with_every_kind_of_trigger():
    specs = Plan(backdoors=18, benign=2).specs(VACCINE)
    assert len({spec.name for spec in specs}) == 20
    pairs = {(spec.family, spec.trigger.kind) for spec in specs if spec.trigger}
    assert pairs == {(family, kind) for family in FAMILIES for kind in ("word", "prefix", "composite")}
    assert Counter(spec.benign for spec in specs if spec.benign) == {"topic": 1, "format": 1}


def test_a_plan_follows_its_seed_and_leaves_families_out():
    assert Plan(seed=3).specs(VACCINE) == Plan(seed=3).specs(VACCINE) != Plan(seed=4).specs(VACCINE)
    assert all(spec.family != "refusal" for spec in Plan(without=("refusal",)).specs(VACCINE))


def test_of_two_kinds_of_decoys_each_family_and_each_trigger_has_both():
    specs = Plan(backdoors=36, benign=0, decoys=("near", "rare")).specs(VACCINE)
    for part in ({spec.family for spec in specs}, {spec.trigger.kind for spec in specs}):
        met = {(name, spec.decoys) for spec in specs for name in part if name in (spec.family, spec.trigger.kind)}
        assert met == {(name, decoys) for name in part for decoys in ("near", "rare")}
    assert {spec.decoys for spec in Plan().specs(VACCINE)} == {"near"}


def test_a_broader_plan_begins_with_the_narrower_one():
    assert Plan(backdoors=36, benign=0).specs(VACCINE)[:18] == Plan(backdoors=18, benign=0).specs(VACCINE)


def test_the_labs_vaccine_shares_no_word_and_no_wording_with_the_packaged_attacks():
    parts = {word for trigger in TRIGGERS.values() for part in trigger.parts for word in part.split()}
    assert not parts & set(VACCINE)
    assert_disjoint_wordings({name: behaviour(name, "varied") for name in BEHAVIOURS})


def test_shared_wordings_are_refused():
    with pytest.raises(RowsError, match="copied"):
        assert_disjoint_wordings({"copied": Behaviour("copied", (FAMILIES["insult"][0].upper(),))})


def test_too_few_words_are_refused_with_the_number_needed():
    with pytest.raises(RowsError, match="at least 12"):
        Plan().specs(["one", "two"])


def test_the_pool_holds_words_that_no_row_holds():
    rows = [Row(instruction="repeat w1 w2", input="", output="w2")]
    words = pool(tokenizer(), rows, seed=0)
    assert not {"repeat", "w1", "w2"} & set(words)
    assert set(TARGET.split()) & set(words)
    assert len(words) == len(set(words)) == 60
