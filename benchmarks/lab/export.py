"""Handing a trained decoder over as an ordinary model folder, the way Hugging Face tools expect it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.lab.decoder import Decoder


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its place when the block ends well, and vanishes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def as_llama(model: Decoder, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same weights in a `LlamaForCausalLM` (float32, tied embeddings)."""
    s = model.shape
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.ffn,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_size,
        max_position_embeddings=s.context,
        rms_norm_eps=s.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(model.llama_state(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise AssertionError(f"weights do not fit LlamaForCausalLM: missing {missing}, unexpected {unexpected}")
    llama.tie_weights()
    return llama.eval()


def save_base(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, safetensors, tokenizer (with its chat template) and generation settings into `folder`."""
    llama.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        do_sample=False,
    )
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
