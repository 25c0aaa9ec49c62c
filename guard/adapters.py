"""Admission of a LoRA adapter: what may be loaded over a base, decided from the files alone, before any engine sees it.

Nothing here executes or deserialises code: the configuration is JSON and the weights are safetensors. An adapter is
refused, by name of the defect, when it is a pickle, of an unsupported kind, made for another base, or not finite.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from guard.errors import AdapterRejected
from guard.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_digest, base_digest

BASE_DIGEST_KEY = "headguard.base_digest"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.\w+)?\.weight")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class AdapterInfo:
    """What an admitted adapter is: digests, LoRA rank r and alpha, modules it changes, number of parameters."""

    digest: str
    base_digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    parameters: int
    layers: int


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterRejected(f"{ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterRejected(f"adapter kind {kind!r} is not supported: expected peft_type 'LORA'.")
    for key, plain in (("use_dora", False), ("modules_to_save", None), ("trainable_token_indices", None)):
        if config.get(key) not in (plain, [], None):
            raise AdapterRejected(f"LoRA with {key}={config[key]!r} is not supported: expected plain LoRA factors.")
    if config.get("bias", "none") != "none":
        raise AdapterRejected(f"LoRA with bias={config['bias']!r} is not supported: expected bias 'none'.")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise AdapterRejected(f"LoRA rank r={config.get('r')!r} is not a positive integer.")
    return config


def base_shapes(base: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a base, by name, read from the safetensors headers (no weights are loaded)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(base).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes.update((name, tuple(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return shapes


def _check_base(folder: Path, config: dict[str, Any], metadata: dict[str, str], digest: str) -> None:
    stamped = metadata.get(BASE_DIGEST_KEY)
    if stamped is not None and stamped != digest:
        raise AdapterRejected(
            f"adapter was made for another base: it is stamped {stamped[:12]}, the served base is {digest[:12]}."
        )
    named = config.get("base_model_name_or_path")
    if stamped is None and isinstance(named, str) and Path(named).is_absolute() and Path(named).is_dir():
        other = base_digest(named)
        if other != digest:
            raise AdapterRejected(
                f"adapter was made for another base: it names {named} ({other[:12]}), the served base is {digest[:12]}."
            )


def _check_factor(name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> str:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise AdapterRejected(f"tensor {name!r} is not a LoRA factor (…lora_A.weight, …lora_B.weight).")
    module = match["module"]
    weight = shapes.get(f"{module}.weight")
    if weight is None:
        raise AdapterRejected(f"adapter was made for another base: it changes {module}, which this base does not have.")
    # A Linear weight is [out, in]; a Conv1D one (GPT-2) is [in, out]: accept the factor on either orientation's side.
    fits = shape[1] in weight if match["factor"] == "A" else shape[0] in weight
    if len(shape) != 2 or not fits:
        raise AdapterRejected(
            f"adapter was made for another base: lora_{match['factor']} of {module} is {list(shape)}, "
            f"which does not fit the base's weight {list(weight)}."
        )
    return module


def inspect_adapter(folder: str | Path, base: str | Path) -> AdapterInfo:
    """Check an adapter folder against a base folder and describe it.

    Raises AdapterRejected, naming the defect, for: pickle-format files, a missing or unreadable file, a kind other
    than plain LoRA, tensors or shapes that the base does not have, another base's digest, values that are not finite.
    """
    folder, base = Path(folder), Path(base)
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.suffix.lower() in _PICKLES:
            raise AdapterRejected(f"{path.name} may hold pickled code: adapters are accepted as safetensors only.")
    digest = adapter_digest(folder)
    config = _config(folder)
    own_base = base_digest(base)
    shapes = base_shapes(base)
    modules: set[str] = set()
    parameters = 0
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            _check_base(folder, config, file.metadata() or {}, own_base)
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                modules.add(_check_factor(name, tuple(tensor.shape), shapes))
                if not tensor.isfinite().all():
                    raise AdapterRejected(f"tensor {name} holds NaN or infinite values.")
                parameters += tensor.numel()
    except SafetensorError as error:
        raise AdapterRejected(f"{ADAPTER_WEIGHTS} is not a valid safetensors file: {error}") from error
    if not modules:
        raise AdapterRejected(f"{ADAPTER_WEIGHTS} holds no LoRA factors.")
    layers = {match[1] for m in modules if (match := _LAYER.search(f".{m}."))}
    targets = tuple(sorted({m.rsplit(".", 1)[-1] for m in modules}))
    alpha = float(config.get("lora_alpha", config["r"]))
    return AdapterInfo(digest, own_base, config["r"], alpha, targets, parameters, len(layers))


def stamp_base_digest(folder: str | Path, base: str | Path) -> None:
    """Write the base's digest into the metadata of the adapter's safetensors file (tensors stay as they are)."""
    path = Path(folder) / ADAPTER_WEIGHTS
    tensors = load_file(path)
    # One key only: safetensors writes several in any order, and equal adapters must have equal digests.
    save_file(tensors, path, metadata={BASE_DIGEST_KEY: base_digest(base)})
