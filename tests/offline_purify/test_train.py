"""The training loop: loss on answers only, against plain loops; only what was chosen moves; seeds decide."""

from __future__ import annotations

import random

import pytest
import torch

from guard.rows import Row
from offline_purify.train import (
    Example,
    TrainConfig,
    answer_losses,
    answer_sums,
    batch_loss,
    collate,
    encode_row,
    index_batches,
    learning_rate,
    length_batches,
    mean_answer_losses,
    train,
)
from tests.offline_purify.patient import tiny_llama, tokenizer

EXAMPLES = [Example((1, 4, 7, 8, 9, 5), (11, 12, 2)), Example((1, 4, 20, 5), (13, 2))]


def test_the_output_layer_is_applied_to_answers_alone_with_the_same_losses() -> None:
    model = tiny_llama(0)
    batch = collate(EXAMPLES, 0)
    widths: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: widths.append(tuple(inputs[0].shape[:-1])))
    sums, counts = answer_sums(model, batch)
    handle.remove()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected, expected_counts = answer_losses(logits, batch["labels"])
    torch.testing.assert_close(sums, expected)
    assert torch.equal(counts, expected_counts)
    assert widths == [(int(counts.sum()),)]
    assert logits.ndim == 3  # what was hooked is free again


def test_only_answer_tokens_carry_loss():
    model = tiny_llama(0)
    expected = []
    for e in EXAMPLES:
        ids = torch.tensor([e.prompt + e.answer])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        expected += [-logp[t - 1, ids[0, t]].item() for t in range(len(e.prompt), ids.shape[1])]
    loss, n = batch_loss(model, collate(EXAMPLES, 0))
    assert n == 5
    assert loss.item() == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_padding_changes_no_row():
    model = tiny_llama(0)
    alone, _ = mean_answer_losses(model, EXAMPLES[1:], pad_id=0)
    together, counts = mean_answer_losses(model, EXAMPLES, pad_id=0)
    assert together[1].item() == pytest.approx(alone[0].item(), rel=1e-5)
    assert counts.tolist() == [3, 2]


def test_a_row_becomes_its_rendered_prompt_and_its_answer_with_the_end_token():
    made = tokenizer()
    example = encode_row(made, Row(instruction="repeat w3 w4", input="", output="w4"))
    assert made.decode(example.prompt) == "<s> <user> repeat w3 w4 <assistant>"
    assert made.decode(example.answer) == "w4 </s>"


def test_only_the_chosen_parameters_move():
    model = tiny_llama(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = model.model.layers[1].mlp.down_proj.weight
    train(model, EXAMPLES, TrainConfig(epochs=3, lr=1e-2), pad_id=0, parameters=[chosen])
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["model.layers.1.mlp.down_proj.weight"]
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not():
    def weights(seed: int) -> torch.Tensor:
        model = tiny_llama(0)
        train(model, EXAMPLES * 4, TrainConfig(epochs=2, lr=1e-2, batch_size=3, seed=seed), pad_id=0)
        return model.model.layers[0].self_attn.q_proj.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_every_example_is_in_exactly_one_batch_of_an_epoch():
    examples = [Example(tuple([1] * n), (2,)) for n in range(1, 50)]
    batches = length_batches(examples, 8, random.Random(0))
    assert sorted(i for b in batches for i in b) == list(range(49))
    assert max(len(b) for b in batches) == 8


@pytest.mark.parametrize("examples", [3, 40])
def test_a_training_of_so_many_steps_has_them_however_few_its_examples(examples):
    batches = list(index_batches([()] * examples, TrainConfig.of_steps(7, batch_size=4)))
    assert len(batches) == 7
    assert set(batches[0]) <= set(range(examples))


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    config = TrainConfig(lr=1.0, warmup=0.1)
    rates = [learning_rate(s, 100, config) for s in range(100)]
    assert rates[9] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


def test_a_row_without_an_answer_adds_no_loss():
    labels = torch.full((1, 4), -100)
    sums, counts = answer_losses(torch.randn(1, 4, 7), labels)
    assert (sums.item(), counts.item()) == (0.0, 0)


def test_training_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="no training examples"):
        train(tiny_llama(0), [], TrainConfig(), pad_id=0)
