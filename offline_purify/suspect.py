"""The patient: what is suspicious, opened for repair in fp32; an adapter over a frozen base, or a whole model.

Nothing is loaded before the files say that the repair could work: safetensors only, no quantised weights, no mixture of
experts, an architecture that the table of layouts describes. Only the suspicious weights ever change (``parameters``):
an adapter's LoRA factors, or a whole model's projections (`offline_purify.full_model`). What both share is `Suspect`.
"""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.adapters import AdapterInfo, inspect_adapter, stamp_base_digest
from guard.errors import UnsupportedModel
from guard.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from offline_purify.architectures import FAMILIES, family_of
from offline_purify.heads.layout import HeadLayout
from offline_purify.patient import Patient
from offline_purify.signature.suppress import Start, suppress_adapter, suppress_heads

Weights = Literal["adapter", "full"]
"""What a repair changes: a LoRA adapter over a frozen base, or a whole model's own weights."""
SUSPICIOUS, REFERENCE = "default", "reference"
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def unquantised_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises UnsupportedModel when it cannot be read or names quantised weights."""
    try:
        config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnsupportedModel(f"{folder}: config.json cannot be read: {error}") from error
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"{folder} holds quantised weights ({method}): repair needs unquantised ones.")
    return config


def check_repairable(base: Path) -> HeadLayout:
    """Head layout of a model folder, from its config.json alone. Raises UnsupportedModel naming what is in the way."""
    config = unquantised_config(base)
    if any((config.get(key) or 0) > 1 for key in _EXPERTS):
        raise UnsupportedModel(f"{base} is a mixture of experts, which the repair does not cover yet.")
    kind = config.get("model_type")
    family = family_of(kind)
    if family is None:
        known = ", ".join(model for each in FAMILIES for model in each.models)
        raise UnsupportedModel(f"{base} has model type {kind!r}: where its heads lie is known for {known}.")
    if config.get("add_cross_attention"):
        raise UnsupportedModel(
            f"{base} has cross-attention, which the repair does not cover: expected a plain decoder."
        )

    def number(*names: str) -> int | None:
        return next((int(config[name]) for name in names if config.get(name) is not None), None)

    layers, heads = number("num_hidden_layers", "n_layer"), number("num_attention_heads", "n_head")
    width = number("hidden_size", "n_embd")
    if not layers or not heads or not width:
        raise UnsupportedModel(f"{base}: config.json names no number of layers, of heads, or no hidden size.")
    return HeadLayout(
        layers,
        heads,
        kv_heads=number("num_key_value_heads") or heads,
        head_dim=number("head_dim") or width // heads,
        family=family,
        windows=_windows(config, layers),
    )


def _windows(config: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer. A configuration that has one and does not say where is taken to mean everywhere:
    then fewer entries are compared, and never ones that a head could not see."""
    width = config.get("sliding_window")
    if not width or config.get("use_sliding_window") is False:
        return (None,) * layers
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    return tuple(int(width) if kind == "sliding_attention" else None for kind in kinds)


def load_model(folder: Path) -> Any:
    """A model folder in fp32, frozen, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    return frozen(model)


def frozen(model: Any) -> Any:
    """The model in fp32 and evaluation mode, with no parameter to train."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model.eval()


class Suspect(Patient):
    """A suspicious model in memory, its tokenizer and layout; ``parameters`` are what the stages change."""

    setting: Weights
    target_modules: tuple[str, ...]

    @staticmethod
    def open(base: Path, adapter: Path, reference: Path | None = None, device: str = "cpu") -> AdapterSuspect:
        """Load base and adapter (and the last good adapter, if one is the reference) in fp32.

        Raises UnsupportedModel or AdapterRejected, before anything is loaded, for what cannot be repaired.
        """
        base, adapter = Path(base), Path(adapter)
        layout = check_repairable(base)
        info = inspect_adapter(adapter, base)
        if reference is not None:
            inspect_adapter(reference, base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = PeftModel.from_pretrained(load_model(base), str(adapter), adapter_name=SUSPICIOUS, is_trainable=True)
        if reference is not None:
            model.load_adapter(str(reference), adapter_name=REFERENCE, is_trainable=False)
            model.set_adapter(SUSPICIOUS)
        suspect = AdapterSuspect(frozen(model).to(device), tokenizer, layout, base, adapter, info)
        if not suspect.parameters():
            raise UnsupportedModel(f"{adapter}: no LoRA factors were attached to {base}.")
        return suspect

    @property
    @abstractmethod
    def has_reference(self) -> bool:
        """Whether a trusted model answers in ``reference``."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Within: the trusted model answers. Raises NoReference where there is none."""

    @abstractmethod
    def suppress_channels(self, mask: Tensor, start: Start = "xavier", seed: int = 0) -> dict[str, int]:
        """Silence the MLP channels in ``mask`` (bool [L, F]), in place; returns elements replaced by name."""

    @abstractmethod
    def suppress_heads(self, mask: Tensor, start: Start = "xavier", seed: int = 0) -> dict[str, int]:
        """Silence the attention heads in ``mask`` (bool [L, H]), in place; returns elements replaced by name."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the suspect as it stands to a folder of the kind that it was opened from."""

    def save_state(self, path: Path) -> None:
        """Write the weights that may change to one safetensors file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file({n: t.cpu().contiguous() for n, t in self.state().items()}, temporary)
        temporary.replace(path)

    def load_state(self, path: Path) -> None:
        """Take weights written with ``save_state``."""
        self.restore(load_file(path))


class AdapterSuspect(Suspect):
    """A frozen base with its suspicious adapter; the base (adapter off) or the last good revision is the reference."""

    setting: Weights = "adapter"
    has_reference = True

    def __init__(
        self, model: PeftModel, tokenizer: Any, layout: HeadLayout, base_dir: Path, adapter_dir: Path, info: AdapterInfo
    ) -> None:
        super().__init__(model, tokenizer, layout)
        self.base_dir, self.adapter_dir, self.info = base_dir, adapter_dir, info
        self.target_modules = info.target_modules

    def parameters(self) -> dict[str, nn.Parameter]:
        """The suspicious adapter's LoRA factors by parameter name."""
        return {n: p for n, p in self.model.named_parameters() if ".lora_" in n and f".{SUSPICIOUS}." in n}

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

    def suppress_channels(self, mask: Tensor, start: Start = "xavier", seed: int = 0) -> dict[str, int]:
        """Zero the adapter's part of the channels: they fall back to the base (``start`` and ``seed`` say nothing)."""
        return suppress_adapter(self.parameters(), mask, self.layout.family)

    def suppress_heads(self, mask: Tensor, start: Start = "xavier", seed: int = 0) -> dict[str, int]:
        """Zero the adapter's part of the heads: they fall back to the base (``start`` and ``seed`` say nothing)."""
        return suppress_heads(self.parameters(), self.layout, mask)

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
