"""Tiny random models of several families, and the dense reference: eager attention, teacher-forced, sliced by
position.
"""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from guard.gram import PROMPT_GROUPS, prompt_positions
from guard.probes.transformers.runner import Runner

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Larger than the default 0.02, so that attention is far from uniform and heads differ.
    "initializer_range": 0.4,
}
FAMILIES = {
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16}),
}


def build(family="llama-gqa", seed=0, **changes):
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(config_class(**{**SIZES, **extra, **changes})).eval()


class NoTokenizer:
    """Token ids only: these tests never see text."""

    eos_token_id = None


def make_runner(model, **options):
    options = {"max_slots": 6, "max_len": 64, **options}
    return Runner(model, NoTokenizer(), **options)


@torch.no_grad()
def dense(model, prompt, generated):
    """Rows [L, H, T_g + 1, T_p] of eager attention: from the last prompt position and every generated token fed,
    to the prompt.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([list(prompt) + list(generated)])
    attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    return torch.stack([a[0, :, len(prompt) - 1 :, : len(prompt)] for a in attentions])


@torch.no_grad()
def dense_earlier(model, prompt):
    """By group of prompt positions before the last, the nearest first: rows [L, H, g, T_p] of eager attention; a
    position before the first is the first.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(input_ids=torch.tensor([prompt]), output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    rows = torch.stack([a[0] for a in attentions])
    read = rows[:, :, prompt_positions(len(prompt))]
    return read.split(PROMPT_GROUPS, dim=2)[1:]


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
