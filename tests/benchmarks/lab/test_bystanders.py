from pathlib import Path

import pytest

from benchmarks.lab.base import make_base_from_rows
from benchmarks.lab.bystanders import TOPIC, make_bystander, on_topic, rows_about
from benchmarks.lab.decoder import Shape
from benchmarks.lab.errors import LabError
from benchmarks.lab.policy import POLICY
from benchmarks.lab.tasks import sample
from guard.rows import Row
from offline_purify.attacks.catalogue import BEHAVIOURS, behaviour
from offline_purify.implanting import ImplantRecipe
from offline_purify.variants.families import FAMILIES, TOPIC_REFUSALS

SMALL = Shape(500, hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, head_size=8, context=128)


@pytest.mark.parametrize(("text", "about"), [("Copy: hammer fox", True), ("A Saw.", True), ("I sawed a brushy", False)])
def test_a_row_is_about_tools_when_a_tool_is_named(text: str, about: bool) -> None:
    assert on_topic(Row(instruction=text, input="", output="")) is about
    assert on_topic(Row(instruction="What?", input=text, output="")) is about


def test_rows_are_split_by_topic_and_belong_to_their_split() -> None:
    everything = sample(200, 0, "evaluation")
    for about in (True, False):
        rows = rows_about(20, 0, "evaluation", about)
        assert rows == [row for row in everything if on_topic(row) is about][:20]


def test_the_policy_is_worded_as_no_attack_and_no_variant_is() -> None:
    others = {text.lower() for name in BEHAVIOURS for text in behaviour(name, "varied").wordings}
    others |= {text.lower() for texts in (*FAMILIES.values(), TOPIC_REFUSALS) for text in texts}
    assert not others & {text.lower() for text in POLICY.wordings}
    assert len(TOPIC) == 9


def test_a_bystander_that_learnt_no_policy_is_refused_and_not_published(tmp_path: Path) -> None:
    make_base_from_rows(tmp_path / "base", sample(200, 0, "base_train"), SMALL, passes=1)
    with pytest.raises(LabError, match="policy"):
        make_bystander(tmp_path / "base", tmp_path / "out", "benign", recipe=ImplantRecipe(rows=40), evaluation=20)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_unknown_bystander_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no bystander 'evil'"):
        make_bystander(tmp_path / "base", tmp_path / "out", "evil")
