"""What a scan says of its findings, in words."""

import pytest

from offline_purify.findings import Finding, conclusions, reasons, remarks
from offline_purify.intervals import wilson


def finding(*parts: str, fired: int = 12, flagged: int = 12, says: str = "no way sir", unusual: int = 0) -> Finding:
    shares = [wilson(fired, 12), wilson(flagged, 12), wilson(unusual, 100)]
    assert shares[0] is not None
    return Finding(
        kind="word", parts=parts, place="anywhere", fired=shares[0], flagged=shares[1], says=says,
        signal="shift", unusual=shares[2],
    )  # fmt: skip


def test_nothing_found_has_no_reasons():
    assert reasons([], []) == []


def test_stimuli_that_bring_the_same_answer_are_told_together():
    told = reasons([finding("cf"), finding("mn"), finding("bb", says="print this line")], [])
    assert len(told) == 2
    assert (
        "'cf': 12 of 12 clean prompts are then answered with 'no way sir' or the like; the guard flags 12 of 12."
        in told[0]
    )
    assert told[0].endswith("Other stimuli that bring the like: 1.")


def test_attention_alone_is_said_to_be_attention_alone():
    (told,) = reasons([finding("cf", fired=2)], [])
    assert "answers do not change in a recurring way; the guard flags 12 of 12" in told


def test_a_reaction_to_anything_unusual_is_called_so():
    assert "anything unusual" in finding("cf", unusual=60).sentence()
    assert "anything unusual" not in finding("cf", unusual=1).sentence()


def test_clean_prompts_flagged_beyond_what_a_calibration_realises_are_a_remark():
    assert "where alpha is 0.01" in remarks(wilson(20, 200), 0.01, 0.025, {})[0]
    assert remarks(wilson(3, 200), 0.01, 0.025, {}) == []
    assert remarks(None, 0.01, 0.025, {}) == []


def test_an_answer_that_clean_prompts_get_as_well_is_said_to_look_like_a_rule():
    assert "rule about a topic" in finding("tool").model_copy(update={"without": 52}).sentence()
    assert "rule" not in finding("tool").sentence()


def test_answers_that_unlike_clean_prompts_share_are_a_remark():
    (told,) = remarks(None, 0.01, 0.025, {"I do not speak of rivers.": 9})
    assert told.startswith("9 clean prompts that are not alike are answered 'I do not speak of rivers.'")


def test_a_phrase_is_told_as_one():
    assert finding("ik", "cf").model_copy(update={"place": "front"}).sentence().startswith("'ik cf' in front: ")


@pytest.mark.parametrize(("covered", "said"), [(820, "very likely have shown"), (400, "420 words")])
def test_how_much_of_the_vocabulary_was_tried_is_said(covered, said):
    can, cannot = conclusions(covered, 820, {"made-up": 10, "pair": 10, "phrase": 10}, True, 2)
    assert said in " ".join(can + cannot)
    assert ("very likely have shown" in " ".join(can)) == (covered == 820)


def test_what_was_not_tried_is_never_excluded():
    _, cannot = conclusions(820, 820, {}, True, 2)
    assert "cannot be excluded" in cannot[0]
    assert not any("No vaccine" in line for line in cannot)
    assert any("No vaccine" in line for line in conclusions(820, 820, {}, False, 2)[1])
