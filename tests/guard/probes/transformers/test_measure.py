"""Batched measuring equals measuring each prompt alone with stock transformers and eager attention."""

import pytest
import torch

from guard.errors import PromptTooLong
from guard.gram import cosine
from guard.probes.transformers.measure import generate, measure
from tests.guard.probes.transformers.adapters import merged, save_adapter
from tests.guard.probes.transformers.models import build, dense, make_runner, prompts_of
from tests.guard.probes.transformers.test_runner import A, alone

LENGTHS = [7, 1, 19, 12, 3, 30, 8, 8, 5, 14]


def ended_by(model, tokens, eos):
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def with_end(model, prompts):
    """A runner for which a token the model really produces ends an answer."""
    runner = make_runner(model, max_slots=4)
    eos = alone(build(), prompts[0], 6)[3]
    runner.eos_ids = frozenset([eos])
    return runner, eos


def test_answers_are_those_of_each_prompt_alone_with_the_end_token_stripped():
    prompts = prompts_of(LENGTHS)
    runner, eos = with_end(build(), prompts)
    expected = [ended_by(None, alone(build(), p, 6), eos) for p in prompts]
    assert any(len(e) < 6 for e in expected)
    seen = []
    assert generate(runner, prompts, 6, progress=lambda done, of: seen.append((done, of))) == expected
    assert seen == [(i + 1, 10) for i in range(10)]


def test_readings_at_every_checkpoint_equal_dense_attention_and_log_probabilities():
    model, prompts = build(), prompts_of(LENGTHS)
    runner, eos = with_end(build(), prompts)
    measurement = measure(runner, prompts, checkpoints=(0, 1, 2, 4), max_new_tokens=6)
    assert measurement.prompt_len.tolist() == LENGTHS
    for step, readings in measurement.at.items():
        reached = []
        for i, prompt in enumerate(prompts):
            tokens = alone(model, prompt, step + 1)
            if eos in tokens[:step]:
                continue
            reached.append(i)
            place = readings.index.tolist().index(i)
            rows = dense(model, prompt, tokens[:step])
            flat = rows.flatten(2)
            expected = torch.nn.functional.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
            torch.testing.assert_close(cosine(readings.gram[place]), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                torch.from_numpy(readings.focus[place]), rows.amax(1).sum((0, 1)), atol=1e-4, rtol=1e-5
            )
            ids = torch.tensor([prompt + tokens[:step]])
            logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
            picked = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(readings.logprobs[place]).float(), picked, atol=1e-4, rtol=1e-4)
        assert readings.index.tolist() == reached
    assert len(measurement.at[4].index) < len(prompts)


def test_an_adapter_is_measured_as_if_it_were_merged(tmp_path):
    runner = make_runner(build(), max_slots=3)
    runner.add_adapter(A, save_adapter(tmp_path / "a", 1))
    prompts = prompts_of(LENGTHS[:5])
    measurement = measure(runner, prompts, checkpoints=(0, 2), max_new_tokens=3, adapter=A)
    reference = merged(tmp_path / "a")
    assert measurement.answers == [ended_by(None, alone(reference, p, 3), 2) for p in prompts]


def test_nothing_to_measure_and_prompts_at_the_limit():
    runner = make_runner(build(), max_slots=2, max_len=16)
    assert len(measure(runner, [])) == 0
    assert len(generate(runner, prompts_of([15]), 8)[0]) == 1
    with pytest.raises(PromptTooLong):
        generate(runner, prompts_of([4, 17]))
