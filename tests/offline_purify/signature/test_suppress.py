"""Suppressed channels, on real Llama shapes with real PEFT adapters."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from offline_purify.heads.layout import HeadLayout
from offline_purify.signature.suppress import suppress_adapter, suppress_heads, suppress_model

F, WIDTH = 24, 16
MLP = ["gate_proj", "up_proj", "down_proj"]


def llama(bias=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=WIDTH, intermediate_size=F, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, mlp_bias=bias,
        )
    )  # fmt: skip


def adapted(targets):
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model, {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture
def mask():
    chosen = torch.zeros(2, F, dtype=torch.bool)
    chosen[0, [1, 7]], chosen[1, 23] = True, True
    return chosen


def test_a_suppressed_channel_is_the_bases_and_no_other_is(mask):
    model, parameters = adapted(MLP)
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    zeroed = suppress_adapter(parameters, mask)
    assert sum(zeroed.values()) == 3 * 3 * 4
    base, merged = llama(), model.merge_and_unload()
    for layer in range(2):
        for name, dimension in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            theirs = getattr(base.model.layers[layer].mlp, name).weight
            ours = getattr(merged.model.layers[layer].mlp, name).weight
            same = (theirs == ours).all(1 - dimension)
            assert torch.equal(same, mask[layer])
    for name, parameter in parameters.items():
        if ("down" in name) == ("lora_B" in name):  # shared by all channels
            assert torch.equal(parameter, kept[name])


def test_an_adapter_without_mlp_factors_is_refused(mask):
    with pytest.raises(ValueError, match="no MLP channels"):
        suppress_adapter(adapted(["q_proj"])[1], mask)
    with pytest.raises(ValueError, match="24 channels, the signature 12"):
        suppress_adapter(adapted(MLP)[1], mask[:, :12])


@pytest.mark.parametrize("start", ["xavier", "initializer", "zero_down"])
def test_channels_of_a_full_model_start_again_and_the_rest_is_bit_identical(mask, start):
    model, before = llama(bias=True), llama(bias=True)
    with torch.no_grad():
        for side in (model, before):
            for name, parameter in side.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(0.5)
    suppress_model(dict(model.named_parameters()), mask, start)
    bound = math.sqrt(6 / (F + WIDTH))
    fresh = []
    for (name, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        if ".mlp." not in name:
            assert torch.equal(now, then)
            continue
        layer, down = int(name.split(".")[2]), "down_proj" in name
        if name.endswith("bias"):
            expected = then.clone()
            if not down:
                expected[mask[layer]] = 0
            assert torch.equal(now, expected)
            continue
        ours, theirs = (now.T, then.T) if down else (now, then)
        assert torch.equal(ours[~mask[layer]], theirs[~mask[layer]])
        replaced = ours[mask[layer]]
        if start == "zero_down" and down:
            assert not replaced.any()
        else:
            assert (replaced != theirs[mask[layer]]).all()
            fresh.append(replaced.flatten())
    values = torch.cat(fresh).detach()
    if start == "initializer":
        assert values.std() == pytest.approx(0.02, rel=0.3)
    else:
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.9 * bound


def test_another_layout_is_refused(mask):
    with pytest.raises(ValueError, match="not supported"):
        suppress_model({"h.0.mlp.c_fc.weight": torch.nn.Parameter(torch.zeros(4, 4))}, mask)


def test_a_suppressed_head_is_the_bases_and_shared_keys_stay_until_the_whole_group_goes():
    layout = HeadLayout(2, 2, 1, WIDTH // 2)
    model, parameters = adapted(["q_proj", "k_proj", "v_proj", "o_proj"])
    mask = torch.tensor([[True, False], [True, True]])
    suppress_heads(parameters, layout, mask)
    base, merged = llama(), model.merge_and_unload()
    for layer in range(2):
        theirs, ours = base.model.layers[layer].self_attn, merged.model.layers[layer].self_attn
        wide = mask[layer].repeat_interleave(WIDTH // 2)
        assert torch.equal((theirs.q_proj.weight == ours.q_proj.weight).all(1), wide)
        assert torch.equal((theirs.o_proj.weight == ours.o_proj.weight).all(0), wide)
        for name in ("k_proj", "v_proj"):
            same = (getattr(theirs, name).weight == getattr(ours, name).weight).all()
            assert bool(same) == bool(mask[layer].all())
    assert suppress_heads(adapted(MLP)[1], layout, mask) == {}
