"""Who is who: digests of bases and adapters, and the names of adapter revisions.

A profile, a verdict and an audit line are only worth something when they say exactly which weights they speak about.
A base is identified by its configuration, weights and tokenizer; an adapter by its two PEFT files; a revision is
``name@sha256-<first 12 hex of the adapter digest>``.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from guard.errors import AdapterRejected, UnsupportedModel

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_REVISION = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})@sha256-([0-9a-f]{12})")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _digest(folder: Path, names: list[str]) -> str:
    total = hashlib.sha256()
    for name in sorted(names):
        with open(folder / name, "rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, 64 hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_digest(folder: str | Path) -> str:
    """SHA-256 (64 hex) over config.json, all ``*.safetensors`` and the tokenizer files of a base model folder.

    Raises UnsupportedModel when the folder holds no config.json or no safetensors weights.
    """
    folder = Path(folder)
    weights = [path.name for path in folder.glob("*.safetensors")]
    if not (folder / "config.json").is_file() or not weights:
        raise UnsupportedModel(f"{folder} is not a model folder: expected config.json and *.safetensors in it.")
    names = ["config.json", *weights, *(n for n in _TOKENIZER_FILES if (folder / n).is_file())]
    return _digest(folder, names)


def adapter_digest(folder: str | Path) -> str:
    """SHA-256 (64 hex) over the two PEFT files of an adapter folder. Raises AdapterRejected when one is missing."""
    folder = Path(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterRejected(f"{folder} is not a PEFT adapter in safetensors form: {name} is missing.")
    return _digest(folder, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])


def check_name(name: str) -> str:
    """Return ``name`` if it may name an adapter, else raise AdapterRejected.

    Names become folder names and URL parts, so the alphabet is small: lower-case letters, digits, ``-`` and ``_``.
    """
    if not _NAME.fullmatch(name):
        raise AdapterRejected(
            f"{name!r} cannot name an adapter: use 1 to 63 of a-z, 0-9, '-' and '_', starting with a letter or digit."
        )
    return name


def revision_name(name: str, digest: str) -> str:
    """The immutable public name of one adapter revision: ``name@sha256-<12 hex>``."""
    return f"{check_name(name)}@sha256-{digest[:12]}"


def parse_revision(revision: str) -> tuple[str, str]:
    """Split ``name@sha256-<12 hex>`` into (name, 12 hex). Raises AdapterRejected for anything else."""
    match = _REVISION.fullmatch(revision)
    if match is None:
        raise AdapterRejected(f"{revision!r} is not a revision: expected NAME@sha256-<12 hex digits>.")
    return match[1], match[2]
