"""A frozen decoder that has less to do computes the same answers and the same gradients."""

import copy
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from offline_purify.frozen import answers_alone, last_mlp, lean
from offline_purify.train import Example, answer_sums, collate
from tests.offline_purify.bodies import ARCHITECTURES, config_of

PROJECTION = "base_model.model.model.layers.0.self_attn.q_proj"
EXAMPLES = [
    Example((1, 4, 7, 8, 9, 5), (11, 12, 2)),
    Example((1, 4, 20, 5), (13, 2)),
    Example((1, 4, 21, 22, 5), (2,)),
    Example((1, 4, 9, 23, 24, 25, 5), (14, 15, 16, 17, 2)),
]


def decoder(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.add_(0.2 * torch.randn_like(p))  # norms' weights are all 1 otherwise
        p.requires_grad_("embed" in name or "wte" in name)
    return model


def sums_and_gradient(model, *contexts):
    model.zero_grad()
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        sums, _ = answer_sums(model, collate(EXAMPLES, 0))
    sums.sum().backward()
    return sums.detach(), model.get_input_embeddings().weight.grad.clone()


def less_to_do(model, groups):
    return lean(model), answers_alone(last_mlp(model), collate(EXAMPLES, 0)["labels"], groups)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_answers_and_gradients_are_those_of_the_plain_model(kind, groups):
    model = decoder(kind)
    plain, gradient = sums_and_gradient(model)
    sums, again = sums_and_gradient(model, *less_to_do(model, groups))
    torch.testing.assert_close(sums, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, gradient, atol=1e-5, rtol=1e-4)
    assert gradient.abs().max() > 1e-2


def test_the_last_mlp_meets_as_many_tokens_of_each_group_as_the_one_that_asks_for_most():
    model = decoder("llama")
    met = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: met.append(tuple(inputs[0].shape)))
    for groups in (1, 2, 4):
        sums_and_gradient(model, *less_to_do(model, groups))
    assert met == [(3 + 2 + 1 + 5, 32), (2 * (1 + 5), 32), (4 * 5, 32)]
    assert last_mlp(model) is model.model.layers[-1].mlp
    assert last_mlp(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rotary_positions_are_those_of_the_plain_model(kind):
    model = decoder(kind)
    with lean(model):
        turned = [name for name, module in model.named_modules() if name.endswith("attn") and "forward" in vars(module)]
    assert len(turned) == (0 if kind == "gpt2" else 2)


def test_a_rotary_function_of_another_convention_is_left_alone():
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {"vocab_size": 52, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 1}
    model = CohereForCausalLM(CohereConfig(**sizes, num_attention_heads=4, pad_token_id=0)).eval()
    attention = model.model.layers[0].self_attn
    with lean(model):
        assert "forward" not in vars(attention)  # it turns neighbours, not halves


def test_heads_of_which_a_part_alone_is_turned_are_turned_by_their_own_function():
    config = config_of("phi3")
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 0.5}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    batch = collate(EXAMPLES, 0)
    plain, _ = answer_sums(model, batch)
    with lean(model):
        sums, _ = answer_sums(model, batch)
    torch.testing.assert_close(sums, plain, atol=1e-5, rtol=1e-5)


def test_norms_are_put_back_and_those_that_learn_are_left_alone():
    model = decoder("llama")
    learns = model.model.norm
    learns.weight.requires_grad_(True)
    with lean(model):
        assert "forward" in vars(model.model.layers[0].input_layernorm)
        assert "forward" not in vars(learns)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_lean_norm_is_differentiated_rightly():
    torch.manual_seed(1)
    model = decoder("llama")
    norm = model.model.norm
    x = torch.randn(3, 5, 32)
    seen = torch.randn(3, 5, 32)
    found = []
    for changed in (False, True):
        mine = x.clone().requires_grad_()
        if changed:
            with lean(model):
                out = norm(mine)
        else:
            out = norm(mine)
        (out * seen).sum().backward()
        found.append((out.detach(), mine.grad))
    for plain, changed in zip(*found, strict=True):
        torch.testing.assert_close(changed, plain, atol=1e-5, rtol=1e-5)


def adapted(kind="llama", **options):
    """A decoder that carries an adapter which changes what it says, all of it frozen but the embedding."""
    model = get_peft_model(decoder(kind), LoraConfig(r=4, target_modules="all-linear", **options)).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
        p.requires_grad_("embed" in name)
    return model


def merged(model):
    with lean(model):
        return [name for name, module in model.named_modules() if name.endswith("_proj") and "forward" in vars(module)]


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_an_adapter_that_is_not_trained_is_one_product_with_its_base(kind):
    model = adapted(kind)
    found = sums_and_gradient(model), sums_and_gradient(model, lean(model))
    for plain, changed in zip(*found, strict=True):
        torch.testing.assert_close(changed, plain, atol=1e-5, rtol=1e-4)
    assert merged(model)
    with model.disable_adapter():
        without, _ = sums_and_gradient(model)
        assert not merged(model)
    assert (without - found[0][0]).abs().max() > 0.01


def test_copies_of_a_lean_model_share_what_it_holds():
    model = adapted()
    weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
    with lean(model):
        projections = [copy.deepcopy(m, dict(weights)).get_submodule(PROJECTION) for m in (model, model)]
    held = [module.forward.__closure__ for module in projections]
    assert held[0] is held[1]


def test_an_adapter_that_is_trained_or_not_a_plain_product_is_left_alone():
    trained = adapted()
    for name, p in trained.named_parameters():
        p.requires_grad_("lora_" in name)
    assert not merged(trained)
    assert not merged(adapted(use_dora=True))
    assert not merged(adapted(lora_bias=True))
    training = adapted(lora_dropout=0.5).train()
    assert not merged(training)
    taken_in = adapted()
    taken_in.merge_adapter()
    assert not merged(taken_in)
