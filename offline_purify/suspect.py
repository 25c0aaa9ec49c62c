"""The patient: a frozen base with its suspicious adapter on it, opened for repair in fp32.

Nothing is loaded before the files say that the repair could work: safetensors LoRA only, no quantised weights, no
mixture of experts, separate q/k/v/o projections with known names. Only the suspicious adapter ever changes; the base
(adapter off) or the last good revision answers as the trusted reference.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.adapters import AdapterInfo, inspect_adapter, stamp_base_digest
from guard.errors import UnsupportedModel
from guard.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from offline_purify.heads.layout import HeadLayout
from offline_purify.train import pad_id_of

SUSPICIOUS, REFERENCE = "default", "reference"
_SEPARATE_QKV = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def check_repairable(base: Path) -> HeadLayout:
    """Head layout of a base model folder, from its config.json alone. Raises UnsupportedModel naming what is in the
    way."""
    try:
        config: dict[str, Any] = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnsupportedModel(f"{base}: config.json cannot be read: {error}") from error
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"{base} holds quantised weights ({method}): repair needs the unquantised base.")
    if any((config.get(key) or 0) > 1 for key in _EXPERTS):
        raise UnsupportedModel(f"{base} is a mixture of experts, which the repair does not cover yet.")
    kind = config.get("model_type")
    if kind not in _SEPARATE_QKV:
        raise UnsupportedModel(
            f"{base} has model type {kind!r}: expected separate q_proj, k_proj, v_proj and o_proj, as in "
            f"{', '.join(_SEPARATE_QKV)}."
        )
    heads = int(config["num_attention_heads"])
    return HeadLayout(
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
    )


class Suspect:
    """A base and its suspicious adapter in memory; the adapter's weights are what the stages change."""

    def __init__(
        self, model: PeftModel, tokenizer: Any, layout: HeadLayout, base_dir: Path, adapter_dir: Path, info: AdapterInfo
    ) -> None:
        self.model, self.tokenizer, self.layout = model, tokenizer, layout
        self.base_dir, self.adapter_dir, self.info = base_dir, adapter_dir, info
        self.pad_id = pad_id_of(tokenizer)

    @classmethod
    def open(cls, base: Path, adapter: Path, reference: Path | None = None, device: str = "cpu") -> Suspect:
        """Load base and adapter (and the last good adapter, if one is the reference) in fp32.

        Raises UnsupportedModel or AdapterRejected, before anything is loaded, for what cannot be repaired.
        """
        base, adapter = Path(base), Path(adapter)
        layout = check_repairable(base)
        info = inspect_adapter(adapter, base)
        if reference is not None:
            inspect_adapter(reference, base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
        model = PeftModel.from_pretrained(plain, str(adapter), adapter_name=SUSPICIOUS, is_trainable=True)
        if reference is not None:
            model.load_adapter(str(reference), adapter_name=REFERENCE, is_trainable=False)
            model.set_adapter(SUSPICIOUS)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        model.to(device).eval()
        suspect = cls(model, tokenizer, layout, base, adapter, info)
        if not suspect.parameters():
            raise UnsupportedModel(f"{adapter}: no LoRA factors were attached to {base}.")
        return suspect

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The suspicious adapter's LoRA factors by parameter name."""
        return {n: p for n, p in self.model.named_parameters() if ".lora_" in n and f".{SUSPICIOUS}." in n}

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapter's weights."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put weights taken with ``state`` back, bit for bit."""
        with torch.no_grad():
            for name, p in self.parameters().items():
                p.copy_(state[name])

    def save_state(self, path: Path) -> None:
        """Write the adapter's weights to one safetensors file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file({n: t.cpu().contiguous() for n, t in self.state().items()}, temporary)
        temporary.replace(path)

    def load_state(self, path: Path) -> None:
        """Take weights written with ``save_state``."""
        self.restore(load_file(path))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within: the trusted model answers (last good adapter if one was given, else the base alone)."""
        if REFERENCE in self.model.peft_config:
            self.model.set_adapter(REFERENCE)
            try:
                yield
            finally:
                self.model.set_adapter(SUSPICIOUS)
                for parameter in self.model.parameters():
                    parameter.requires_grad_(False)
        else:
            with self.model.disable_adapter():
                yield

    @contextmanager
    def attention_matrices(self) -> Iterator[None]:
        """Within: forwards can return attention matrices (eager attention); stock sdpa outside."""
        inner: Any = self.model.get_base_model()
        inner.set_attn_implementation("eager")
        try:
            yield
        finally:
            inner.set_attn_implementation("sdpa")

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder with the input's configuration, fp32, stamped with the base's digest."""
        folder = Path(folder)
        temporary = folder.with_name(folder.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        shutil.copyfile(self.adapter_dir / ADAPTER_CONFIG, temporary / ADAPTER_CONFIG)
        tensors = get_peft_model_state_dict(self.model, adapter_name=SUSPICIOUS)
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, temporary / ADAPTER_WEIGHTS)
        stamp_base_digest(temporary, self.base_dir)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
