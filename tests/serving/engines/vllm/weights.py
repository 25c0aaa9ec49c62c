"""A tiny random Llama whose heads are wide enough for vLLM's CPU kernels, and PEFT adapters over it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tests.guard.probes.transformers.adapters import TARGETS
from tests.guard.probes.transformers.models import build
from tests.guard.probes.transformers.text import save_model

# Heads of 32 are the narrowest that vLLM's CPU attention knows.
SHAPE = {"head_dim": 32, "max_position_embeddings": 1024}


def save_base(folder: Path) -> Path:
    """Writes the base with its word-level tokenizer and chat template. Returns the folder."""
    return save_model(folder, **SHAPE)


def save_adapter(folder: Path, seed: int, scale: float = 0.3) -> Path:
    """Writes a LoRA with random A and B, large enough to change every answer. Returns the folder."""
    model = get_peft_model(build(**SHAPE), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder
