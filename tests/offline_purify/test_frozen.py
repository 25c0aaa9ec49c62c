"""A frozen decoder that has less to do computes the same answers and the same gradients."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from offline_purify.frozen import answers_alone, last_mlp, lean
from offline_purify.train import Example, answer_sums, collate
from tests.offline_purify.bodies import ARCHITECTURES, config_of

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


def sums_and_gradient(model, groups):
    model.zero_grad()
    batch = collate(EXAMPLES, 0)
    with lean(model), answers_alone(last_mlp(model), batch["labels"], groups):
        sums, _ = answer_sums(model, batch)
    sums.sum().backward()
    return sums.detach(), model.get_input_embeddings().weight.grad.clone()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_answers_and_gradients_are_those_of_the_plain_model(kind, groups):
    model = decoder(kind)
    batch = collate(EXAMPLES, 0)
    plain, _ = answer_sums(model, batch)
    plain.sum().backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    sums, again = sums_and_gradient(model, groups)
    torch.testing.assert_close(sums, plain.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, gradient, atol=1e-5, rtol=1e-4)
    assert gradient.abs().max() > 1e-2


def test_the_last_mlp_meets_as_many_tokens_of_each_group_as_the_one_that_asks_for_most():
    model = decoder("llama")
    met = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: met.append(tuple(inputs[0].shape)))
    for groups in (1, 2, 4):
        sums_and_gradient(model, groups)
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
