"""One tiny untrained model of each architecture, and where its heads and channels lie, written down by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from guard.adapters import stamp_base_digest
from offline_purify.train import Example
from tests.offline_purify.patient import tokenizer

LAYERS, HEADS, KV_HEADS, HEAD, WIDTH, CHANNELS, WINDOW = 2, 4, 2, 8, 32, 20, 5
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2")
EXAMPLES = [Example((1, 4, 7, 8, 9, 5), (11, 12, 2)), Example((1, 4, 20, 5), (13, 2))]
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "vocab_size": 52,
    "hidden_size": WIDTH,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    **_IDS,
}


def config_of(kind: str) -> PretrainedConfig:
    """Grouped keys everywhere but in GPT-2, which has none; Mistral with a short window; Qwen3 with wider heads."""
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=52, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=CHANNELS, n_positions=64, **_IDS
        )
    if kind == "mistral":
        return MistralConfig(**_SIZES, head_dim=HEAD, sliding_window=WINDOW)
    if kind == "qwen3":
        return Qwen3Config(**_SIZES, head_dim=12)
    if kind == "phi3":
        return Phi3Config(**_SIZES)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**_SIZES)


def body(kind: str, folder: Path, seed: int = 3) -> Path:
    """A model folder with random weights and biases."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.1))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, kind: str) -> Path:
    """A LoRA folder with random factors on all projections of a base."""
    targets = {
        "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }.get(kind, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    torch.manual_seed(4)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    stamp_base_digest(folder, base)
    return folder


def places(kind: str, layer: int, part: str, unit: int) -> list[tuple[str, tuple[Any, ...]]]:
    """(parameter name, index) of everything that a head (of q, o), a key/value head (of k, v) or a channel owns."""
    size = 12 if kind == "qwen3" else HEAD
    if part in ("gate", "up", "down"):
        size = 1
    own = slice(unit * size, (unit + 1) * size)
    every = slice(None)
    if kind == "gpt2":
        block = f"transformer.h.{layer}."
        if part in "qkv":
            at = "qkv".index(part) * WIDTH
            own = slice(at + own.start, at + own.stop)
            return [(block + "attn.c_attn.weight", (every, own)), (block + "attn.c_attn.bias", (own,))]
        if part == "up":
            return [(block + "mlp.c_fc.weight", (every, own)), (block + "mlp.c_fc.bias", (own,))]
        if part == "gate":
            return []
        return [(block + {"o": "attn.c_proj.weight", "down": "mlp.c_proj.weight"}[part], (own, every))]
    block = f"model.layers.{layer}."
    if kind == "phi3" and part in "qkv":
        at = {"q": 0, "k": HEADS * HEAD, "v": (HEADS + KV_HEADS) * HEAD}[part]
        return [(block + "self_attn.qkv_proj.weight", (slice(at + own.start, at + own.stop), every))]
    if kind == "phi3" and part in ("gate", "up"):
        at = CHANNELS if part == "up" else 0
        return [(block + "mlp.gate_up_proj.weight", (slice(at + unit, at + unit + 1), every))]
    path = block + ("self_attn." if part in "qkvo" else "mlp.") + f"{part}_proj"
    if part in ("o", "down"):
        return [(path + ".weight", (every, own))]
    bias = [(path + ".bias", (own,))] if kind == "qwen2" and part in "qkv" else []
    return [(path + ".weight", (own, every)), *bias]


def owned(kind: str, state: dict[str, torch.Tensor], units: list[tuple[int, str, int]]) -> dict[str, torch.Tensor]:
    """True on what the (layer, part, unit)s own, by the name of each weight in ``state``."""
    found = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in state.items()}
    for layer, part, unit in units:
        for name, index in places(kind, layer, part, unit):
            found[name][index] = True
    return found
