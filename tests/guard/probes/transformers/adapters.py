"""Real PEFT adapters for the tiny models, with factors large enough to change every answer."""

import torch
from peft import LoraConfig, get_peft_model

from tests.guard.probes.transformers.models import build

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def save_adapter(folder, seed, family="llama-gqa", targets=TARGETS, **options):
    """Writes a LoRA with random A and B over build(family), made as PEFT makes and saves one. Returns the folder."""
    model = get_peft_model(build(family), LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


def merged(folder, family="llama-gqa"):
    """The adapter folded into the weights: the independent reference for a row of a mixed batch."""
    from peft import PeftModel

    return PeftModel.from_pretrained(build(family), folder).merge_and_unload().eval()
