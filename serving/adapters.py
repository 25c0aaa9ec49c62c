"""The registry of adapter revisions: what was uploaded, checked, and kept where nothing changes it any more.

An upload lands in a private folder, is inspected from its files alone (``guard.adapters``), and only then moved to
``state_dir/adapters/<name>@sha256-…``, read-only. The folder's name is the digest of what is in it, so uploading the
same files again gives the same revision. Profiles are kept the same way, checked against exactly what the engine says
it serves.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from guard.adapters import inspect_adapter
from guard.errors import AdapterRejected
from guard.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_digest, check_name, revision_name
from guard.profile import NO_ADAPTER, Profile, ProfileKey
from serving.audit import append
from serving.errors import Conflict, NotFound
from serving.policy import Policy
from serving.store.database import Store, now
from serving.store.models import Adapter, Revision

KEPT_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# What PEFT and the lab leave beside an adapter; accepted in an upload and not kept.
_IGNORED = frozenset({"README.md", "lab.json", ".gitattributes", "training_args.json"})
BASE = "base"
# What an engine says about its probe beside the configuration that a profile depends on.
_PROBE_STATE = ("attached", "blind", "reason")


def check_file_name(name: str) -> bool:
    """Whether an uploaded file is kept (True) or ignored (False). Raises AdapterRejected for anything else."""
    if name in KEPT_FILES:
        return True
    if name in _IGNORED:
        return False
    if Path(name).name != name or "\\" in name or name.startswith("."):
        raise AdapterRejected(f"{name!r} is a path: send the files of an adapter by their plain names.")
    if Path(name).suffix.lower() in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"):
        raise AdapterRejected(f"{name} may hold pickled code: adapters are accepted as safetensors only.")
    raise AdapterRejected(f"{name} does not belong to a PEFT adapter: expected {' and '.join(KEPT_FILES)}.")


def served_key(status: Mapping[str, Any], adapter: str) -> ProfileKey:
    """What a profile must have been fitted for, from the engine's status. ``adapter`` is a digest, or "none"."""
    probe = status["probe"]
    key = probe.get("key") or {name: value for name, value in probe.items() if name not in _PROBE_STATE}
    return ProfileKey(status["base"]["digest"], adapter, status["engine"], status["dtype"], key)


def get_revision(session: Session, revision: str) -> Revision:
    """A revision by name, or NotFound."""
    row = session.get(Revision, revision)
    if row is None:
        raise NotFound(f"there is no revision {revision!r}.", code="revision_not_found")
    return row


def get_adapter(session: Session, alias: str, lock: bool = False) -> Adapter:
    """An adapter by its public name, or NotFound. ``lock`` keeps others from changing it in this transaction."""
    row = session.get(Adapter, alias, with_for_update=lock or None)
    if row is None:
        raise NotFound(f"there is no adapter {alias!r}.", code="adapter_not_found")
    return row


class Registry:
    """Keeps revisions and profiles. Blocking: call it from a thread."""

    def __init__(self, store: Store, state_dir: Path, base_dir: Path, base_name: str, default_policy: Policy) -> None:
        self._store, self._base_dir, self._base_name = store, base_dir, base_name
        self._default_policy = default_policy
        self._adapters, self._profiles = state_dir / "adapters", state_dir / "profiles"
        self.incoming = state_dir / "incoming"
        for folder in (self._adapters, self._profiles, self.incoming):
            folder.mkdir(parents=True, exist_ok=True)

    def ensure_base(self, digest: str) -> None:
        """Give the base its row, so that it is a model with a policy like any other. Its profile goes if it changed."""
        with self._store.write() as session:
            adapter = session.get(Adapter, self._base_name)
            if adapter is None:
                session.add(
                    Adapter(alias=self._base_name, live_revision=self._base_name, created_at=now(), updated_at=now())
                )
                session.flush()
            row = session.get(Revision, self._base_name)
            if row is None:
                session.add(
                    Revision(
                        revision=self._base_name, alias=self._base_name, digest=digest, base_digest=digest,
                        state="live", source=BASE, info={}, created_by="gateway", created_at=now(),
                    )
                )  # fmt: skip
            elif row.digest != digest:
                append(session, "gateway", "base.changed", self._base_name, {"from": row.digest, "to": digest})
                row.digest = row.base_digest = digest
                row.profile_path = row.profile_digest = row.smallest_alpha = row.profile_at = None

    def admit(
        self, name: str, folder: Path, actor: str, source: str = "upload", parent: str | None = None
    ) -> tuple[Revision, bool]:
        """Check the adapter in ``folder`` and keep it as a revision of ``name``; (row, whether it is new).

        The folder is copied, not consumed. Raises AdapterRejected with the defect; then nothing was kept.
        """
        check_name(name)
        if name == self._base_name:
            raise Conflict(f"{name!r} is the name of the base model; choose another for the adapter.")
        info = inspect_adapter(folder, self._base_dir)
        revision = revision_name(name, info.digest)
        kept = self._keep_folder(folder, revision, info.digest)
        with self._store.write() as session:
            known = session.get(Revision, revision)
            if known is not None:
                return known, False
            if session.get(Adapter, name) is None:
                session.add(Adapter(alias=name, created_at=now(), updated_at=now()))
                session.flush()
            row = Revision(
                revision=revision, alias=name, digest=info.digest, base_digest=info.base_digest, state="uploaded",
                source=source, parent=parent, path=str(kept), info=asdict(info), created_by=actor, created_at=now(),
            )  # fmt: skip
            session.add(row)
            append(session, actor, "revision.admitted", revision, {"source": source, "digest": info.digest})
        return row, True

    def _keep_folder(self, folder: Path, revision: str, digest: str) -> Path:
        kept = self._adapters / revision
        if not kept.exists():
            part = self._adapters / f".{revision}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for name in KEPT_FILES:
                shutil.copyfile(folder / name, part / name)
                (part / name).chmod(0o444)
            part.replace(kept)
            kept.chmod(0o555)
        self.check_folder(kept, digest)
        return kept

    @staticmethod
    def check_folder(kept: Path, digest: str) -> None:
        """Raise AdapterRejected when the files of a kept revision are not what was admitted."""
        found = adapter_digest(kept)
        if found != digest:
            raise AdapterRejected(
                f"the files in {kept.name} were changed: digest {found[:12]}, admitted {digest[:12]}."
            )

    def attach_profile(self, revision: str, file: Path, status: Mapping[str, Any], actor: str) -> Revision:
        """Check a profile against what is served and make it the revision's; an uploaded one becomes calibrated.

        ``status`` is the engine's. Raises ProfileMismatch naming every difference; for a live revision AlphaTooFine
        when its policy asks for more than this profile can support (for others, the swap asks).
        """
        with self._store.read() as session:
            row = get_revision(session, revision)
            policy = get_adapter(session, row.alias).policy
        digest = NO_ADAPTER if row.source == BASE else row.digest
        profile = Profile.load(file, served_key(status, digest))
        if row.state == "live":
            check_policy(Policy.model_validate(policy) if policy else self._default_policy, profile)
        kept = self._profiles / f"{profile.digest}.safetensors"
        if not kept.exists():
            part = kept.with_suffix(".part")
            shutil.copyfile(file, part)
            part.chmod(0o444)
            part.replace(kept)
        with self._store.write() as session:
            row = get_revision(session, revision)
            if row.state == "retired":
                raise Conflict(f"{revision} is retired.")
            row.profile_path, row.profile_digest = str(kept), profile.digest
            row.smallest_alpha, row.profile_at = profile.smallest_alpha(), now()
            row.state = "calibrated" if row.state == "uploaded" else row.state
            append(session, actor, "profile.attached", revision, {"profile": profile.digest})
        return row

    def set_policy(self, alias: str, policy: Policy, actor: str) -> Adapter:
        """Set the policy of a public name. Raises AlphaTooFine when its live profile cannot support the alpha."""
        with self._store.write() as session:
            adapter = get_adapter(session, alias, lock=True)
            live = session.get(Revision, adapter.live_revision) if adapter.live_revision else None
            if live is not None and live.profile_path:
                check_policy(policy, Profile.load(live.profile_path))
            before, adapter.policy = adapter.policy, policy.model_dump()
            adapter.updated_at = now()
            append(session, actor, "policy.set", alias, {"from": before, "to": adapter.policy})
        return adapter

    def revisions(self, alias: str | None = None) -> list[Revision]:
        """All revisions, or those of one name, oldest first."""
        wanted = select(Revision).order_by(Revision.created_at)
        with self._store.read() as session:
            return list(session.scalars(wanted.where(Revision.alias == alias) if alias else wanted))


def check_policy(policy: Policy, profile: Profile) -> None:
    """Raise AlphaTooFine when a profile cannot support a policy's alpha within its window."""
    profile.check_alpha(policy.alpha, policy.window)
