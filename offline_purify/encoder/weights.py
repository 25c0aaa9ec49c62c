"""Where an encoder's weights lie: a model folder, a folder that holds one (an unpacked package), or a package's name.

Nothing is loaded or fetched: installing a package of weights is the operator's business.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from guard.errors import UnsupportedModel

_DEEPEST = 4  # folders below the one given


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises UnsupportedModel when it cannot be read."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnsupportedModel(f"{folder}: config.json cannot be read: {error}") from error
    return config


def find_weights(where: str | Path) -> Path:
    """The one model folder (config.json with a model type, and safetensors) at or below ``where``.

    ``where`` is a path, or the name of an installed package that carries weights. Raises UnsupportedModel when there is
    none, or more than one to choose from.
    """
    root = Path(where)
    if not root.is_dir():
        root = _package_folder(str(where))
    if (root / "config.json").is_file():
        return root
    found = sorted(path.parent for path in root.rglob("model*.safetensors") if _is_model(path.parent, root))
    found = list(dict.fromkeys(found))
    if not found:
        raise UnsupportedModel(f"{root}: no model folder in it; expected config.json beside model.safetensors.")
    if len(found) > 1:
        raise UnsupportedModel(f"{root} holds {len(found)} model folders; name one of {', '.join(map(str, found))}.")
    return found[0]


def _is_model(folder: Path, root: Path) -> bool:
    if len(folder.relative_to(root).parts) > _DEEPEST or not (folder / "config.json").is_file():
        return False
    return "model_type" in read_config(folder)


def _package_folder(name: str) -> Path:
    module = name.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedModel(f"{name}: neither a folder nor an installed package of weights.")
    return Path(next(iter(spec.submodule_search_locations)))
