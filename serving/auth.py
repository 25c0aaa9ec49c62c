"""Who may do what. API keys with one role each, shown once, stored as hashes.

| role | may |
|---|---|
| client | call /v1 |
| viewer | client's, and read the admin plane without any prompt text |
| operator | viewer's, and change adapters, policies and cases, swap, ask for repairs; issue client and viewer keys |
| approver | viewer's, and decide about repairs; issue client, viewer and operator keys; revoke keys |

An approver is deliberately not an operator: who proposes a change never decides on it alone. Approver keys are issued
only on the host (first start, or the command that opens the database), and nobody decides about what a key asked for
that they issued, that belongs to the same owner, or that is their own.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from serving.audit import append
from serving.errors import BadRequest, Forbidden, NotFound, Unauthenticated
from serving.store.database import Store, new_id, now
from serving.store.models import ApiKey

Role = Literal["client", "viewer", "operator", "approver"]
ROLES: tuple[Role, ...] = get_args(Role)
_MAY: dict[Role, frozenset[Role]] = {
    "client": frozenset({"client"}),
    "viewer": frozenset({"client", "viewer"}),
    "operator": frozenset({"client", "viewer", "operator"}),
    "approver": frozenset({"client", "viewer", "approver"}),
}
_MAY_ISSUE: dict[Role, frozenset[Role]] = {
    "client": frozenset(),
    "viewer": frozenset(),
    "operator": frozenset({"client", "viewer"}),
    "approver": frozenset({"client", "viewer", "operator"}),
}
HOST = "host"
KEYS_FILE = "keys.json"


@dataclass(frozen=True)
class Caller:
    """The key behind a request. ``anonymous`` callers exist only with auth = off, and only as clients."""

    key_id: str
    owner: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether this caller may do what needs ``role``."""
        return role in _MAY[self.role]

    def require(self, role: Role) -> Caller:
        """Return self, or raise Forbidden naming the role that is needed and the one that is held."""
        if not self.may(role):
            raise Forbidden(f"this needs the role {role!r}; key {self.key_id} has the role {self.role!r}.")
        return self


ANONYMOUS = Caller("anonymous", "anonymous", "client")


def _hash(token: str) -> str:
    # The token holds 256 random bits, so a plain hash is enough: there is nothing to guess slowly.
    return hashlib.sha256(token.encode()).hexdigest()


def issue(session: Session, owner: str, role: Role, issued_by: Caller | None = None) -> tuple[ApiKey, str]:
    """Make a key and return its row and its token (the only time the token exists in clear).

    ``issued_by`` None means the host itself, which alone may make approver keys. Raises Forbidden or BadRequest.
    """
    if role not in ROLES:
        raise BadRequest(f"role {role!r} is not one of {', '.join(ROLES)}.", param="role")
    if not owner.strip() or len(owner) > 128:
        raise BadRequest("owner names the person or program that holds the key (1 to 128 characters).", param="owner")
    if issued_by is not None and role not in _MAY_ISSUE[issued_by.role]:
        raise Forbidden(f"a key with the role {issued_by.role!r} cannot issue {role!r} keys.")
    token = f"hg_{secrets.token_urlsafe(32)}"
    key = ApiKey(
        id=new_id("key"),
        owner=owner.strip(),
        role=role,
        token_sha256=_hash(token),
        issued_by=issued_by.key_id if issued_by else None,
        created_at=now(),
    )
    session.add(key)
    session.flush()
    append(session, issued_by.key_id if issued_by else HOST, "key.issued", key.id, {"owner": key.owner, "role": role})
    return key, token


def revoke(session: Session, key_id: str, by: Caller) -> ApiKey:
    """Make a key useless from now on. Raises NotFound, or Forbidden when ``by`` could not have issued it."""
    key = session.get(ApiKey, key_id)
    if key is None:
        raise NotFound(f"there is no key {key_id!r}.")
    if key.id != by.key_id and key.role not in _MAY_ISSUE[by.role]:
        raise Forbidden(f"a key with the role {by.role!r} cannot revoke {key.role!r} keys.")
    if key.revoked_at is None:
        key.revoked_at = now()
        append(session, by.key_id, "key.revoked", key.id, {"owner": key.owner, "role": key.role})
    return key


def authenticate(session: Session, authorization: str | None) -> Caller:
    """The caller behind an ``Authorization: Bearer hg_…`` header. Raises Unauthenticated."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("no API key: send the header 'Authorization: Bearer hg_…'.", code="missing_api_key")
    wanted = _hash(token.strip())
    key = session.scalars(select(ApiKey).where(ApiKey.token_sha256 == wanted)).one_or_none()
    # The index found the row by a hash of the token, which tells a timing observer nothing; compare it again anyway.
    if key is None or not hmac.compare_digest(key.token_sha256, wanted) or key.revoked_at is not None:
        raise Unauthenticated("this API key is not known, or was revoked.")
    return Caller(key.id, key.owner, key.role)  # type: ignore[arg-type]


def related(session: Session, first: str, second: str) -> str | None:
    """Why two keys do not count as two people (same key, same owner, one issued the other), or None if they do."""
    if first == second:
        return "it is the same key"
    one, two = session.get(ApiKey, first), session.get(ApiKey, second)
    if one is None or two is None:
        return "one of the keys is not known"
    if one.owner.casefold() == two.owner.casefold():
        return f"both keys belong to {one.owner!r}"
    for child, parent in ((one, two), (two, one)):
        issuer = child.issued_by
        while issuer is not None:
            if issuer == parent.id:
                return f"key {parent.id} issued key {child.id}"
            above = session.get(ApiKey, issuer)
            issuer = above.issued_by if above else None
    return None


def bootstrap(store: Store, state_dir: Path) -> Path | None:
    """On a database without keys, make one key per working role and leave them in ``state_dir/keys.json`` (mode 600).

    Returns the file's path, or None when there were keys already. The operator hands the keys to their people and
    deletes the file; the gateway never reads it.
    """
    with store.write() as session:
        if session.scalar(select(func.count()).select_from(ApiKey)):
            return None
        roles: tuple[Role, ...] = ("client", "operator", "approver")
        tokens = {role: issue(session, f"first-{role}", role)[1] for role in roles}
        path = state_dir / KEYS_FILE
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)
            json.dump(tokens, file, indent=2)
    return path
