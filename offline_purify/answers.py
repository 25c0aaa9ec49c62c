"""Greedy answers of the model as it stands in the clinic, batched: what every evaluation compares.

Left-padded batches of similar length through transformers' own ``generate``; the text is what a client would read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offline_purify.train import Progress, pad_id_of


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
    what: str = "answering",
) -> list[str]:
    """One greedy answer (decoded, special tokens dropped, stripped) per prompt of token ids, order kept."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    pad_id = pad_id_of(tokenizer)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        length = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), length), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, length - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, length - len(prompts[i]) :] = 1
        out: Any = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, generated in zip(indices, out[:, length:].tolist(), strict=True):
            if tokenizer.eos_token_id in generated:
                generated = generated[: generated.index(tokenizer.eos_token_id)]
            answers[i] = tokenizer.decode(generated, skip_special_tokens=True).strip()
        if progress is not None:
            progress(what, min(start + batch_size, len(order)), len(order))
    model.train(was_training)
    return answers
