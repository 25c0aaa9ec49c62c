"""A zoo as the benchmark sees it: one base, its vaccine, adapters without a backdoor, and patients with their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Patient:
    """One implant with what a run of it needs.

    `files` are rows files by the name of their option; `trigger` is None where it has to be found from them; `family`
    is that of the vaccine's variants which behave alike; `beside`: adapters without a backdoor are measured beside it.
    """

    implant: str
    adapter: Path
    family: str
    files: Mapping[str, Path]
    trigger: str | None
    beside: bool


@dataclass(frozen=True)
class Zoo:
    """A base with everything made from it. `bystanders`: `clean` and `benign`, as far as they could be made; `refused`:
    what the lab would not publish, with the reason."""

    name: str
    base: Path
    vaccine: Path
    bystanders: Mapping[str, Path]
    patients: tuple[Patient, ...]
    refused: Mapping[str, str]
