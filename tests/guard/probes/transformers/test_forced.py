"""Forced answers are read as sampled ones are, and as dense eager attention says."""

import pytest
import torch

from guard.errors import GuardError, PromptTooLong
from guard.gram import cosine
from guard.probes.transformers.forced import measure_forced
from guard.probes.transformers.measure import measure
from tests.guard.probes.transformers.models import build, dense, make_runner, prompts_of

LENGTHS = [7, 1, 19, 12, 3, 30, 8]
STEPS = (0, 1, 2, 4)


def same(left, right):
    for step in STEPS:
        one, other = left.at[step], right.at[step]
        assert one.index.tolist() == other.index.tolist()
        torch.testing.assert_close(one.gram, other.gram, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.sink, other.sink, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("as_sampled", [False, True])
def test_forcing_what_the_model_says_anyway_changes_nothing(as_sampled):
    prompts = prompts_of(LENGTHS)
    runner = make_runner(build(), max_slots=4)
    runner.eos_ids = frozenset()
    spoken = measure(runner, prompts, STEPS, 6)
    forced = measure_forced(runner, prompts, spoken.answers, STEPS, as_sampled=as_sampled)
    same(spoken, forced)
    assert forced.prompt_len.tolist() == LENGTHS


def test_readings_of_any_answer_equal_dense_attention_and_log_probabilities():
    model, prompts = build(), prompts_of(LENGTHS)
    answers = [[5 + i, 40 - i, 9, 30, 31, 32][: 1 + i % 6] for i in range(len(prompts))]
    seen = []
    found = measure_forced(
        make_runner(build(), max_slots=3), prompts, answers, STEPS, progress=lambda *x: seen.append(x), as_sampled=True
    )
    assert seen[-1] == (7, 7)
    for step, readings in found.at.items():
        assert readings.index.tolist() == [i for i, answer in enumerate(answers) if len(answer) > step]
        for place, i in enumerate(readings.index.tolist()):
            flat = dense(model, prompts[i], answers[i][:step]).flatten(2)
            expected = torch.nn.functional.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
            torch.testing.assert_close(cosine(readings.gram[place]), expected, atol=1e-5, rtol=0)
            ids = torch.tensor([prompts[i] + answers[i][:step]])
            logprobs = model(input_ids=ids).logits[0, len(prompts[i]) - 1 :].log_softmax(-1)
            mine = logprobs.gather(1, torch.tensor(answers[i][: step + 1])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(readings.logprobs[place]).float(), mine, atol=1e-4, rtol=1e-4)


def test_bad_answers_and_prompts_are_refused_and_slots_are_free_again():
    runner = make_runner(build(), max_slots=2, max_len=16)
    with pytest.raises(GuardError, match="one answer each"):
        measure_forced(runner, prompts_of([3, 4]), [[5]])
    with pytest.raises(GuardError, match="no tokens"):
        measure_forced(runner, prompts_of([3]), [[]])
    with pytest.raises(PromptTooLong):
        measure_forced(runner, prompts_of([17]), [[5]])
    cut = measure_forced(runner, prompts_of([14]), [[5] * 9])
    assert len(cut.answers[0]) == 3
    assert all(runner.length(slot) == 0 for slot in range(2))
