"""Limits of what is kept, erasing after the time to live, and the three ways of storing evidence."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import update

from guard.verdict import HeadScore, Span, Verdict
from serving.cases import Cases, Flag, export_flags
from serving.evidence import EvidenceError, Sealer
from serving.metrics import Metrics
from serving.settings import Settings
from serving.store.database import Store, now
from serving.store.models import Adapter, Case, FlaggedRequest, Revision
from tests.serving.databases import BOTH, database

PROMPT = "the zanzibar prompt"


@pytest.fixture(params=BOTH)
def store(request, tmp_path):
    with database(request.param) as url:
        store = Store(url or f"sqlite:///{tmp_path / 'x.sqlite'}", tmp_path)
        store.migrate()
        with store.write() as session:
            session.add(Adapter(alias="a", created_at=0, updated_at=0))
            session.flush()
            for name in ("a@1", "a@2"):
                row = {"digest": "", "base_digest": "", "state": "live", "source": "upload", "path": "-"}
                session.add(Revision(revision=name, alias="a", info={}, created_by="t", created_at=0, **row))
        yield store
        store.close()


def cases(store, tmp_path, mode="sealed", **limits):
    settings = Settings(model=tmp_path, state_dir=tmp_path, **limits)
    return Cases(store, Sealer.open(tmp_path, mode), settings, Metrics())


def flag(number, revision="a@1"):
    heads, spans = (HeadScore(1, 2, 9.0), HeadScore(0, 3, 5.0)), (Span(3, 5, 0.5, "zanzibar"),)
    verdict = Verdict("flagged", 0.05, 0, "all", True, 0.01, "shift", heads, spans)
    return Flag(f"r{number}", "a", revision, "k", "block", verdict, [{"role": "user", "content": PROMPT}], "no")


def writes(cases, result):
    return cases._metrics.quarantine_writes.labels(result)._value.get()


def only_case(store) -> Case:
    with store.read() as session:
        return session.query(Case).one()


def test_flags_of_one_revision_gather_in_one_case_and_their_heads_are_tallied(store, tmp_path):
    kept = cases(store, tmp_path)
    for number in range(3):
        kept.keep(flag(number))
    case = only_case(store)
    assert (case.flags, case.kept, case.dropped) == (3, 3, 0)
    assert case.heads == {"1.2": 3, "0.3": 3}
    assert case.signals == {"shift": 3}


@pytest.mark.parametrize(
    ("limit", "result"),
    [
        ({"max_flags_per_case": 2}, "dropped_case_full"),
        ({"max_flags_per_minute": 2}, "dropped_rate"),
        ({"max_evidence_bytes": 700}, "dropped_bytes"),
    ],
)
def test_a_flood_is_counted_but_not_kept(store, tmp_path, limit, result):
    kept = cases(store, tmp_path, **limit)
    for number in range(5):
        kept.keep(flag(number))
    case = only_case(store)
    assert case.flags == 5
    assert case.kept + case.dropped == 5
    assert writes(kept, result) == case.dropped > 0


def test_no_more_cases_are_opened_than_the_limit(store, tmp_path):
    kept = cases(store, tmp_path, max_open_cases=1)
    kept.keep(flag(1))
    kept.keep(flag(2, "a@2"))
    assert only_case(store).revision == "a@1"
    assert writes(kept, "dropped_cases") == 1


def test_evidence_is_erased_after_its_time_and_the_verdict_stays(store, tmp_path):
    kept = cases(store, tmp_path, evidence_ttl_days=1)
    kept.keep(flag(1))
    kept.keep(flag(2))
    assert kept.erase_expired() == 0
    with store.write() as session:
        session.execute(update(FlaggedRequest).where(FlaggedRequest.request_id == "r1").values(at=now() - 90_000))
    assert kept.erase_expired() == 1
    with store.read() as session:
        first, second = session.query(FlaggedRequest).order_by(FlaggedRequest.id)
        assert first.evidence is None
        assert first.verdict["status"] == "flagged"
        assert second.evidence is not None


@pytest.mark.parametrize(("mode", "readable", "exported"), [("none", False, 0), ("sealed", False, 1), ("raw", True, 1)])
def test_evidence_is_stored_as_the_operator_chose(store, tmp_path, mode, readable, exported):
    kept = cases(store, tmp_path, mode)
    kept.keep(flag(1))
    with store.read() as session:
        row = session.query(FlaggedRequest).one()
        assert (b"zanzibar" in (row.evidence or b"")) == readable
        assert "zanzibar" not in json.dumps(row.verdict)
        case = row.case_id
    assert export_flags(store, kept._sealer, case, tmp_path / "out.jsonl") == exported


def test_a_key_that_others_can_read_is_refused(tmp_path):
    Sealer.open(tmp_path)
    (tmp_path / "evidence.key").chmod(0o644)
    with pytest.raises(EvidenceError, match="600"):
        Sealer.open(tmp_path)


def test_evidence_sealed_with_another_key_is_said_to_be(tmp_path):
    (tmp_path / "other").mkdir()
    sealed = Sealer.open(tmp_path / "other").write({"a": 1})
    with pytest.raises(EvidenceError, match="another key"):
        Sealer.open(tmp_path).read(sealed or b"", "sealed")


def test_a_flag_that_cannot_be_stored_is_counted_and_never_raises(store, tmp_path):
    kept = cases(store, tmp_path)
    kept.keep(flag(1, "a@unknown"))
    assert writes(kept, "failed") == 1
