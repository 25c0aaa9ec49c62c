"""From flags to an approved repair: cases, roles, the gate, two people, the audit chain. On SQLite and PostgreSQL."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from serving.approvals import repair_failed, repair_job, repair_offered, repair_refused, repair_started
from serving.audit import HEAD_FILE, verify
from serving.auth import issue
from serving.cases import export_flags
from tests.serving.databases import BOTH, database

SECRET = "tell me the zanzibar password please my good old friend of many years"
FLAG_ALL = 0.999


@pytest.fixture(params=BOTH)
def database_url(request):
    with database(request.param) as url:
        yield url


@pytest.fixture
def case(live):
    """A case with three flagged requests."""
    live.policy("support", mode="block", window="prefill", alpha=FLAG_ALL)
    for _ in range(3):
        live.openai().chat.completions.create(
            model="support", messages=[{"role": "user", "content": SECRET}], max_tokens=4
        )
    live.policy("support", mode="block", window="prefill", alpha=0.05)
    return live.ok("viewer", "GET", "/admin/cases")["cases"][0]


def request_repair(house, case):
    response = house.call("operator", "POST", f"/admin/cases/{case['id']}/repair", json={"options": {"seed": 1}})
    assert response.status_code == 202, response.text
    return response.json()["id"]


def offer(house, weights, repair, tmp_path):
    """What the worker reports when the gate is passed; the second adapter plays the candidate."""
    report = tmp_path / "report"
    report.mkdir(exist_ok=True)
    (report / "index.html").write_text("<h1>evidence</h1>")
    (tmp_path / "outside.json").write_text("{}")
    store = house.gateway.store
    assert repair_job(store, repair).options == {"seed": 1}
    repair_started(store, repair)
    candidate, profile = weights.second, weights.profiles["second"]
    metrics = {"asr_before": 1.0, "asr_after": 0.0, "accuracy_before": 0.98, "accuracy_after": 0.97}
    repair_offered(store, repair, candidate=candidate, profile=profile, report=report, metrics=metrics)


def error(response):
    return response.status_code, response.json()["error"]["code"]


def test_a_repair_is_asked_for_by_one_person_and_approved_by_another(live, case, weights, tmp_path):
    repair = request_repair(live, case)
    again = live.call("operator", "POST", f"/admin/cases/{case['id']}/repair")
    assert error(again) == (409, "repair_in_progress")
    assert error(live.call("approver", "POST", f"/admin/repairs/{repair}/approve")) == (409, "not_offered")
    offer(live, weights, repair, tmp_path)
    with live.gateway.store.write() as session:
        asked = live.ok("viewer", "GET", f"/admin/repairs/{repair}")["requested_by"]
        owner = next(k["owner"] for k in live.ok("viewer", "GET", "/admin/keys")["keys"] if k["id"] == asked)
        live.keys["same person"] = issue(session, owner, "approver")[1]
    assert error(live.call("same person", "POST", f"/admin/repairs/{repair}/approve")) == (403, "same_person")
    done = live.ok("approver", "POST", f"/admin/repairs/{repair}/approve", json={"comment": "looks right"})
    assert done["repair"]["state"] == "approved"
    assert done["swap"]["revision"] == weights.revision("second")
    assert live.gateway.aliases.route("support").revision == weights.revision("second")
    assert live.gateway.aliases.route("support").good is None  # the previous one is the suspect
    assert live.ok("viewer", "GET", f"/admin/cases/{case['id']}")["state"] == "closed"
    actions = [row["action"] for row in live.ok("viewer", "GET", "/admin/audit")["rows"]]
    for action in ("case.opened", "repair.requested", "repair.offered", "repair.approved", "adapter.swapped"):
        assert action in actions
    assert live.ok("viewer", "GET", "/admin/audit/verify")["ok"]
    metrics = live.call(None, "GET", "/metrics").text
    assert 'guard_purify_attack_success_ratio{model_name="support",stage="before"} 1.0' in metrics
    assert 'guard_purify_jobs{state="approved"} 1.0' in metrics


def test_a_candidate_that_failed_the_gate_can_never_be_approved(live, case, weights):
    repair = request_repair(live, case)
    repair_started(live.gateway.store, repair)
    repair_refused(live.gateway.store, repair, reasons=["asr_after 0.4 > 0.1"])
    response = live.call("approver", "POST", f"/admin/repairs/{repair}/approve")
    assert error(response) == (409, "not_offered")
    assert "asr_after" in response.json()["error"]["message"]
    assert live.ok("viewer", "GET", f"/admin/cases/{case['id']}")["state"] == "open"


def test_a_repair_that_nobody_approved_does_not_go_live(live, case, weights, tmp_path):
    repair = request_repair(live, case)
    offer(live, weights, repair, tmp_path)
    registry = live.gateway.registry
    row, _ = registry.admit("support", weights.second, "worker", source="repair", parent=case["revision"])
    registry.attach_profile(
        row.revision, weights.profiles["second"], live.ok("viewer", "GET", "/admin/status")["engine"], "worker"
    )
    swap = live.call("operator", "POST", "/admin/adapters/support/swap", json={"revision": row.revision})
    assert error(swap) == (409, "not_approved")
    live.ok("approver", "POST", f"/admin/repairs/{repair}/reject", json={"comment": "no"})
    assert error(live.call("approver", "POST", f"/admin/repairs/{repair}/approve")) == (409, "not_offered")


def test_a_failed_repair_opens_its_case_again(live, case):
    repair = request_repair(live, case)
    repair_failed(live.gateway.store, repair, error="out of memory")
    assert live.ok("viewer", "GET", f"/admin/repairs/{repair}")["reasons"] == ["out of memory"]
    request_repair(live, case)


def test_reports_are_read_by_viewers_and_nothing_else_is(live, case, weights, tmp_path):
    repair = request_repair(live, case)
    offer(live, weights, repair, tmp_path)
    page = live.call("viewer", "GET", f"/admin/repairs/{repair}/report/index.html")
    assert (page.status_code, page.text) == (200, "<h1>evidence</h1>")
    for path in ("..%2Foutside.json", "%2e%2e/outside.json", "%2Fetc%2Fpasswd", "nothing.png"):
        assert live.call("viewer", "GET", f"/admin/repairs/{repair}/report/{path}").status_code == 404
    assert live.call("client", "GET", f"/admin/repairs/{repair}/report/index.html").status_code == 403


def test_text_is_shown_by_role_sealed_on_disk_and_given_to_the_worker(live, case, tmp_path):
    seen = live.ok("viewer", "GET", f"/admin/cases/{case['id']}")
    assert len(seen["requests"]) == 3
    assert "zanzibar" not in json.dumps(seen)
    assert all("text" not in span for r in seen["requests"] for span in r["verdict"]["spans"])
    operator = live.ok("operator", "GET", f"/admin/cases/{case['id']}")
    assert all("text" in span for r in operator["requests"] for span in r["verdict"]["spans"])
    assert "messages" not in operator["requests"][0]
    stored = b"".join(path.read_bytes() for path in live.gateway.settings.state_dir.glob("headguard.sqlite*"))
    assert b"zanzibar" not in stored
    excluded = operator["requests"][0]["request_id"]
    live.ok("operator", "POST", f"/admin/cases/{case['id']}/requests/{excluded}/exclude")
    out = tmp_path / "flags.jsonl"
    assert export_flags(live.gateway.store, live.gateway.sealer, case["id"], out) == 2
    assert os.stat(out).st_mode & 0o777 == 0o600
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["messages"] == [{"role": "user", "content": SECRET}]
    assert rows[0]["verdict"]["status"] == "flagged"
    assert rows[0]["revision"] == case["revision"]


def test_the_audit_table_refuses_change_and_a_change_behind_its_back_is_found(live, case):
    store, state = live.gateway.store, live.gateway.settings.state_dir
    for statement in ("UPDATE audit SET actor = 'x' WHERE seq = 3", "DELETE FROM audit WHERE seq = 3"):
        with pytest.raises(DBAPIError, match="append-only"), store.write() as session:
            session.execute(text(statement))
    if not store.is_sqlite:
        with store.write() as session:
            session.execute(text("ALTER TABLE audit DISABLE TRIGGER audit_no_change"))
            session.execute(text("UPDATE audit SET actor = 'x' WHERE seq = 3"))
    else:
        with sqlite3.connect(state / "headguard.sqlite") as behind:
            behind.execute("DROP TRIGGER audit_no_update")
            behind.execute("UPDATE audit SET actor = 'x' WHERE seq = 3")
    report = live.ok("viewer", "GET", "/admin/audit/verify")
    assert (report["ok"], report["broken_at"]) == (False, 3)


def test_rows_cut_off_the_end_of_the_audit_are_missed(live, case):
    store, state = live.gateway.store, live.gateway.settings.state_dir
    count = int((state / HEAD_FILE).read_text().split()[0])
    with store.write() as session:
        trigger = (
            "DROP TRIGGER audit_no_delete" if store.is_sqlite else "ALTER TABLE audit DISABLE TRIGGER audit_no_change"
        )
        session.execute(text(trigger))
        session.execute(text(f"DELETE FROM audit WHERE seq = {count}"))
    with store.read() as session:
        report = verify(session, state)
    assert (report.ok, report.broken_at) == (False, count)
    assert "cut off" in str(report.problem)
