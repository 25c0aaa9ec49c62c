"""One kind of file for what was fitted: a safetensors file of arrays, with a JSON text in its metadata that says what
they are. Written whole or not at all; nothing in it is ever executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from guard.errors import ProfileMismatch
from guard.identity import file_digest


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> str:
    """Write named arrays and what they are (``about["format"]`` names the kind); returns the file's SHA-256 (hex)."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, part, metadata={"headguard": json.dumps(about, sort_keys=True)})
    part.replace(path)
    return file_digest(path)


def load_arrays(path: str | Path, kind: str, wanted: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and ``about`` of a file of format ``wanted``. Raises ProfileMismatch, calling it a ``kind``, otherwise."""
    path = Path(path)
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("headguard", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ProfileMismatch(f"{path.name} is not a readable {kind}: {error}") from error
    if about.get("format") != wanted:
        raise ProfileMismatch(f"{path.name} is not a {kind} of format {wanted}: found {about.get('format')!r}.")
    return arrays, about
