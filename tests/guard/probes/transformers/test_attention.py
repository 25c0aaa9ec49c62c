"""What the probe measures is what the model attends to, and looking changes nothing."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from guard.errors import UnsupportedModel
from guard.gram import cosine
from guard.probes.transformers.attention import attach
from tests.guard.probes.norms import dense_norms
from tests.guard.probes.transformers.models import FAMILIES, build, dense, dense_earlier, make_runner, prompts_of


def run(runner, prompts, steps, adapters=None):
    """Greedy tokens [N][steps] and all logits, every prompt in its own slot."""
    slots = list(range(len(prompts)))
    logits = [runner.prefill(slots, prompts, adapters)]
    tokens = [[] for _ in slots]
    for _ in range(steps):
        for row, token in zip(tokens, logits[-1].argmax(-1).tolist(), strict=True):
            row.append(token)
        logits.append(runner.decode(slots, [row[-1] for row in tokens], adapters))
    return tokens, torch.stack(logits, 1)


def assert_bank_is(runner, slot, rows):
    """The bank's slot equals dense rows [L, H, T, T_p]: cosines, focus and counts."""
    gram, sink, _, focus, _ = runner.bank.read(slot)
    flat = rows.flatten(2)
    expected = torch.nn.functional.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
    torch.testing.assert_close(cosine(gram), expected, atol=1e-5, rtol=0)
    looked = rows.amax(1).sum((0, 1))
    torch.testing.assert_close(focus / focus.sum(), looked / looked.sum(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sink, rows[..., 0].sum(2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(focus, looked, atol=1e-4, rtol=1e-5)
    assert runner.bank.complete(slot, rows.shape[2])


def assert_earlier_rows_are(runner, slot, groups):
    """What the slot holds of the prompt before its last position is that of dense rows [L, H, g, T_p], group by
    group."""
    gram_of, sink_of, _ = runner.bank.read(slot).earlier
    for rows, gram, sink in zip(groups, gram_of, sink_of, strict=True):
        flat = rows.flatten(2) / rows.shape[2]
        torch.testing.assert_close(gram, flat @ flat.mT, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sink, rows[..., 0].mean(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_and_focus_equal_dense_eager_attention(family):
    model = build(family)
    runner = make_runner(model)
    prompts = prompts_of([7, 1, 19, 45])
    tokens, _ = run(runner, prompts, 5)
    for slot, (prompt, generated) in enumerate(zip(prompts, tokens, strict=True)):
        assert_bank_is(runner, slot, dense(model, prompt, generated))
        assert_earlier_rows_are(runner, slot, dense_earlier(model, prompt))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 4])
def test_norms_are_those_of_the_tokens_whose_rows_are_read(family, chunk):
    model = build(family)
    runner = make_runner(model, chunk=chunk)
    prompts = prompts_of([7, 1, 19, 45])
    tokens, _ = run(runner, prompts, 5)
    for slot, (prompt, generated) in enumerate(zip(prompts, tokens, strict=True)):
        sums, (own, earlier) = runner.bank.read(slot), dense_norms(model, prompt, generated)
        torch.testing.assert_close(sums.norms, own, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(sums.earlier.norms, earlier, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_leaves_every_logit_bit_for_bit_as_it_was(family):
    prompts = prompts_of([7, 1, 19, 45])
    with_probe = run(make_runner(build(family)), prompts, 5)
    without = run(make_runner(build(family), probe=False), prompts, 5)
    assert with_probe[0] == without[0]
    assert torch.equal(with_probe[1], without[1])


def test_a_forward_without_a_plan_is_the_stock_sdpa_forward():
    model = build()
    ids = torch.tensor(prompts_of([9]))
    stock = model(input_ids=ids).logits
    attach(model, 64)
    assert torch.equal(model(input_ids=ids).logits, stock)


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunked_prefill_changes_no_reading(chunk):
    model = build()
    runner = make_runner(model, chunk=chunk)
    prompts = prompts_of([7, 1, 19, 45])
    tokens, _ = run(runner, prompts, 3)
    for slot, (prompt, generated) in enumerate(zip(prompts, tokens, strict=True)):
        assert_bank_is(runner, slot, dense(model, prompt, generated))
        assert_earlier_rows_are(runner, slot, dense_earlier(model, prompt))


def test_batch_order_slots_and_neighbours_change_no_reading():
    model = build()
    runner = make_runner(model)
    prompts = prompts_of([7, 3, 19, 12])
    slots = [5, 0, 3, 2]
    token = runner.prefill(slots, prompts).argmax(-1).tolist()
    order = [2, 0, 3]
    runner.decode([slots[i] for i in order], [token[i] for i in order])
    assert_bank_is(runner, slots[1], dense(model, prompts[1], []))
    for i in order:
        assert_bank_is(runner, slots[i], dense(model, prompts[i], [token[i]]))


def test_rows_that_are_not_observed_leave_the_bank_alone():
    model = build()
    runner = make_runner(model)
    prompts = prompts_of([7, 3])
    token = runner.prefill([0, 1], prompts, observe=[True, False]).argmax(-1).tolist()
    runner.decode([0, 1], token, observe=[True, False])
    assert_bank_is(runner, 0, dense(model, prompts[0], token[:1]))
    assert runner.bank.rows_seen.tolist()[:2] == [2, 0]


def test_half_precision_is_measured_within_its_rounding():
    model = build().to(torch.bfloat16)
    runner = make_runner(model)
    prompt = prompts_of([9])[0]
    runner.prefill([0], [prompt])
    rows = dense(model, prompt, []).float()
    flat = rows.flatten(2)
    expected = torch.nn.functional.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
    torch.testing.assert_close(cosine(runner.bank.read(0)[0]), expected, atol=3e-2, rtol=0)


def test_a_window_shorter_than_the_context_is_refused_and_a_longer_one_is_not():
    with pytest.raises(UnsupportedModel, match="sliding window of 32"):
        attach(build("mistral", sliding_window=32), 64)
    windowed = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    with pytest.raises(UnsupportedModel, match="layer 1 has a sliding window"):
        attach(build("qwen2", **windowed), 64)
    assert attach(build("mistral", sliding_window=64), 64).heads == 4
    assert attach(build("qwen2", **windowed), 32).layers == 3


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_soft_capped_attention_sinks_and_encoder_decoders_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="soft-capped"):
        attach(Gemma2ForCausalLM(Gemma2Config(**SMALL)), 32)
    with pytest.raises(UnsupportedModel, match="sinks"):
        attach(GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2)), 32)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        attach(T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=32, d_ff=32, num_layers=1, num_heads=2)), 32)


def test_attention_with_a_term_the_probe_does_not_know_is_found_out_and_refused():
    model = build()
    layer = model.model.layers[1].self_attn
    stock = layer.forward

    def biased(hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        # A bias towards the first key that travels in the mask: real attention, not q.k alone.
        n = hidden_states.shape[1]
        mask = torch.full((n, n), -1e9).triu(1)
        mask[:, 0] += 2.0
        return stock(hidden_states, position_embeddings, mask[None, None], **kwargs)

    layer.forward = biased
    with pytest.raises(UnsupportedModel, match="layer 1 of LlamaForCausalLM does not attend as measured"):
        attach(model, 64)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_would_be_blind_is_refused():
    model = build()
    layer = model.model.layers[2].self_attn
    stock = layer.forward

    def forgetful(**kwargs):
        kwargs.pop("guard_plan", None)
        return stock(**kwargs)

    layer.forward = forgetful
    with pytest.raises(UnsupportedModel, match=r"saw nothing in layers \[2\]"):
        attach(model, 64)


def test_models_outside_the_attention_interface_are_refused():
    model = build()
    type(model)._supports_attention_backend, before = False, LlamaForCausalLM._supports_attention_backend
    try:
        with pytest.raises(UnsupportedModel, match="attention interface"):
            attach(model, 64)
    finally:
        type(model)._supports_attention_backend = before
