"""The norms that a probe should report, from the vectors of every token of one plain forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from guard.gram import PROMPT_GROUPS, prompt_positions

SPY = "vectors_of_tokens"


@torch.no_grad()
def dense_norms(model: Any, prompt: list[int], generated: list[int]) -> tuple[Tensor, Tensor]:
    """Log norms of queries, outputs, keys and values: summed over the tokens from the last prompt position on [L, W],
    and the means of the groups of prompt positions before it [R - 1, L, W]."""
    kept: list[Tensor] = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any) -> Any:
        result = sdpa_attention_forward(module, query, key, value, mask, **named)
        by_token = [query.transpose(1, 2), result[0], key.transpose(1, 2), value.transpose(1, 2)]
        kept.append(torch.cat([part[0].square().sum(-1).sqrt().log() for part in by_token], dim=-1))
        return result

    AttentionInterface.register(SPY, spy)
    AttentionMaskInterface.register(SPY, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(SPY)
    model(input_ids=torch.tensor([list(prompt) + list(generated)]), use_cache=False)
    model.set_attn_implementation(before)
    norms = torch.stack(kept, dim=1)
    groups = norms[prompt_positions(len(prompt))].split(PROMPT_GROUPS)[1:]
    return norms[len(prompt) - 1 :].sum(0), torch.stack([group.mean(0) for group in groups])
