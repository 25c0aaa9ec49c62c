"""Keys: what is stored of them, who may issue which, and when two keys are not two people."""

from __future__ import annotations

import json
import os

import pytest

from serving.auth import Caller, authenticate, bootstrap, issue, related, revoke
from serving.errors import Forbidden, Unauthenticated
from serving.store.database import Store
from serving.store.models import ApiKey


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'x.sqlite'}", tmp_path)
    store.migrate()
    yield store
    store.close()


def make(session, owner, role, by=None):
    key, _ = issue(session, owner, role, by)
    return Caller(key.id, key.owner, key.role)


def test_the_first_start_leaves_keys_that_only_its_user_can_read_and_later_ones_none(store, tmp_path):
    path = bootstrap(store, tmp_path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    keys = json.loads(path.read_text())
    with store.read() as session:
        assert authenticate(session, f"Bearer {keys['operator']}").role == "operator"
        stored = "".join(key.token_sha256 for key in session.query(ApiKey))
    assert all(token not in stored for token in keys.values())
    assert bootstrap(store, tmp_path) is None


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer hg_unknown"])
def test_what_is_no_key_is_refused(store, header):
    with store.read() as session, pytest.raises(Unauthenticated):
        authenticate(session, header)


@pytest.mark.parametrize(
    ("issuer", "may"),
    [("client", ""), ("viewer", ""), ("operator", "client viewer"), ("approver", "client viewer operator")],
)
def test_a_role_issues_only_lower_ones_and_nobody_issues_approvers_over_http(store, issuer, may):
    with store.write() as session:
        by = make(session, "ann", issuer)
        for role in ("client", "viewer", "operator", "approver"):
            if role in may.split():
                make(session, "bob", role, by)
            else:
                with pytest.raises(Forbidden):
                    make(session, "bob", role, by)


def test_keys_of_one_owner_or_of_one_line_are_one_person(store):
    with store.write() as session:
        ann, carl = make(session, "ann", "approver"), make(session, "carl", "approver")
        bob = make(session, "bob", "operator", ann)
        ann_too = make(session, "Ann", "operator")
        assert "same key" in related(session, ann.key_id, ann.key_id)
        assert "issued" in related(session, bob.key_id, ann.key_id)
        assert "belong" in related(session, ann_too.key_id, ann.key_id)
        assert related(session, bob.key_id, carl.key_id) is None


def test_an_operator_cannot_revoke_an_approver_but_anybody_their_own_key(store):
    with store.write() as session:
        ann, bob = make(session, "ann", "approver"), make(session, "bob", "operator")
        with pytest.raises(Forbidden):
            revoke(session, ann.key_id, bob)
        assert revoke(session, bob.key_id, bob).revoked_at is not None
