"""A small untrained suspect with random adapter weights: enough to test arithmetic on, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from guard.adapters import stamp_base_digest
from offline_purify.suspect import Suspect
from tests.offline_purify.patient import tiny_llama, tokenizer


def small_suspect(
    folder: Path, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
) -> Suspect:
    model = tiny_llama(3)
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(4)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    peft.save_pretrained(folder / "adapter")
    stamp_base_digest(folder / "adapter", folder / "base")
    return Suspect.open(folder / "base", folder / "adapter")
