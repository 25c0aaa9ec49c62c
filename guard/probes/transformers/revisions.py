"""Adapter revisions in one process: loaded and removed at run time, mixed freely in a batch.

PEFT's LoRA layers already compute a batch in which every row names its own adapter (`adapter_names`); this module
keeps the books: which revision is which PEFT adapter, which rows want which, and what may be loaded. An adapter is
loaded from its configuration's numbers and its safetensors file only. Options that would compute something else than
W + (alpha / r) B A, or that touch the shared base weights while loading (PiSSA, OLoRA and similar initialisers do),
are refused or switched off: an adapter must never change the model that other requests see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from guard.adapters import inspect_adapter
from guard.errors import AdapterRejected
from guard.identity import ADAPTER_WEIGHTS

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch

# Options that say where the factors sit and how they are scaled: kept as they are.
_KEPT = frozenset(
    {
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "task_type",
    }
)
# Options of training or of provenance, without effect on what a loaded adapter computes: ignored.
_IGNORED = frozenset(
    {
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "megatron_core",
    }
)


class Revisions:
    """The adapter revisions loaded over one base model. Not thread-safe: its owner calls it between forwards."""

    def __init__(self, model: nn.Module, base_dir: Path | None) -> None:
        self.model: Any = model  # the base until the first revision is loaded, then PEFT's wrapper around it
        self._base_dir = base_dir
        self._keys: dict[str, str] = {}
        self._count = 0
        self._rows: list[str] | None = None
        self._handles: list[Any] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Revisions now loaded."""
        return tuple(self._keys)

    def select(self, names: Sequence[str | None]) -> None:
        """Says which revision each row of the next forward runs (None: the base). Raises AdapterRejected if not
        loaded.
        """
        for name in names:
            if name is not None and name not in self._keys:
                raise AdapterRejected(f"revision {name!r} is not loaded; loaded are {sorted(self._keys) or 'none'}.")
        only = names[0] if names and all(name == names[0] for name in names) else None
        if only is None:
            self._rows = [BASE if name is None else self._keys[name] for name in names]
            return
        # The whole batch runs one revision: PEFT's ordinary path, which spares it the gathering of rows.
        self._rows = None
        if self._keys[only] not in self.model.active_adapters:
            self.model.set_adapter(self._keys[only], inference_mode=True)

    def _tell_rows(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook before every LoRA layer. PEFT's own way sets such hooks anew in each forward, a fifth of a small
        model's step.
        """
        return args, kwargs if self._rows is None else {**kwargs, "adapter_names": self._rows}

    def _hook(self) -> None:
        for handle in self._handles:
            handle.remove()
        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        self._handles = [m.register_forward_pre_hook(self._tell_rows, with_kwargs=True) for m in layers]

    def add(self, name: str, folder: str | Path, inspected: bool = False) -> None:
        """Loads the adapter in `folder` as `name`. Raises AdapterRejected, with the model as it was, if it must
        not be.
        """
        folder = Path(folder)
        if name in self._keys:
            raise AdapterRejected(f"revision {name!r} is already loaded, and revisions never change.")
        if self._base_dir is not None and not inspected:
            inspect_adapter(folder, self._base_dir)
        config = _plain_lora(folder)
        weights = load_file(folder / ADAPTER_WEIGHTS)
        self._count += 1
        key = f"revision{self._count:06d}"
        try:
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(key, config, autocast_adapter_dtype=False)
            else:
                self.model = PeftModel(self.model, config, adapter_name=key, autocast_adapter_dtype=False)
            result: Any = set_peft_model_state_dict(self.model, weights, adapter_name=key)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            self._drop(key)
            raise AdapterRejected(f"adapter {name!r} does not fit this base: {error}") from error
        missing = [k for k in result.missing_keys if f".{key}." in k]
        if missing or result.unexpected_keys:
            self._drop(key)
            first = (missing or list(result.unexpected_keys))[0].replace(f".{key}", "")
            raise AdapterRejected(
                f"adapter {name!r}: its weights do not match its configuration ({len(missing)} missing, "
                f"{len(result.unexpected_keys)} unexpected, first {first})."
            )
        self.model.eval()
        self.model.requires_grad_(False)
        self._keys[name] = key
        self._hook()

    def remove(self, name: str) -> None:
        """Unloads a revision and frees its memory. Raises AdapterRejected if it is not loaded."""
        if name not in self._keys:
            raise AdapterRejected(f"revision {name!r} is not loaded; loaded are {sorted(self._keys) or 'none'}.")
        self._drop(self._keys.pop(name))

    def _drop(self, key: str) -> None:
        loaded = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        if key not in loaded:
            return
        others = [other for other in loaded if other != key]
        if others:
            # PEFT insists on an active adapter, although every row names its own: let it be one that stays.
            self.model.set_adapter(others[0], inference_mode=True)
            self.model.delete_adapter(key)
        else:
            self.model = self.model.base_model.unload()
        self._hook()


def _plain_lora(folder: Path) -> LoraConfig:
    """The adapter's own numbers in a fresh configuration that cannot do anything but plain LoRA."""
    try:
        found = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise AdapterRejected(f"{folder.name}: adapter_config.json cannot be read: {error}") from error
    plain = LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(found, field.name)
        if field.name not in _KEPT | _IGNORED and value != getattr(plain, field.name) and value not in ([], {}):
            raise AdapterRejected(f"LoRA with {field.name}={value!r} is not supported: expected plain LoRA factors.")
    kept = {name: getattr(found, name) for name in _KEPT}
    return LoraConfig(**kept, init_lora_weights=False, inference_mode=True, lora_dropout=0.0)
