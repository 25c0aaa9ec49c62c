"""Evidence: what a flagged client wrote and what the model answered, kept so that the clinic can learn from it.

Three modes: ``none`` keeps nothing, ``sealed`` (the default) encrypts with a key file that only this host has, ``raw``
stores readable JSON. Sealing keeps prompts out of database dumps, backups and views; it does not protect against who
holds the host, since the worker must be able to read what it repairs from.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cryptography.fernet import Fernet, InvalidToken

KEY_FILE = "evidence.key"
Mode = Literal["none", "sealed", "raw"]


class EvidenceError(Exception):
    """Evidence that cannot be read back, or a key file that cannot be used."""


class Sealer:
    """Writes evidence in one mode and reads back any of them."""

    def __init__(self, mode: Mode, key: bytes) -> None:
        self.mode: Mode = mode
        self._fernet = Fernet(key)

    @classmethod
    def open(cls, state_dir: Path, mode: Mode = "sealed") -> Sealer:
        """The sealer of this host; makes ``state_dir/evidence.key`` (mode 600) the first time.

        Raises EvidenceError when the key file is readable by others or is no key.
        """
        path = state_dir / KEY_FILE
        state_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # Of two processes that start at once one links its key into place; both then read that one.
            mine = path.with_name(f".{KEY_FILE}.{os.getpid()}")
            with open(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(Fernet.generate_key())
            with suppress(FileExistsError):
                os.link(mine, path)
            mine.unlink()
        if path.stat().st_mode & 0o077:
            raise EvidenceError(f"{path} is readable by others: it must have mode 600 (chmod 600).")
        try:
            return cls(mode, path.read_bytes().strip())
        except ValueError as error:
            raise EvidenceError(f"{path} is not an evidence key: expected 32 bytes in url-safe base64.") from error

    def write(self, evidence: dict[str, Any]) -> bytes | None:
        """``evidence`` as it is to be stored, or None in mode ``none``."""
        if self.mode == "none":
            return None
        text = json.dumps(evidence, ensure_ascii=False, separators=(",", ":")).encode()
        return self._fernet.encrypt(text) if self.mode == "sealed" else text

    def read(self, stored: bytes, mode: str) -> dict[str, Any]:
        """What ``write`` was given. Raises EvidenceError when it was sealed with another key or damaged."""
        try:
            return json.loads(self._fernet.decrypt(stored) if mode == "sealed" else stored)
        except (InvalidToken, ValueError) as error:
            raise EvidenceError("this evidence was sealed with another key, or is damaged.") from error
