"""`headguard cases`: what was flagged, gathered by revision, and the request to repair it."""

from __future__ import annotations

from typing import Annotated

import typer

from serving.cli.output import AsJson, show, table
from serving.cli.remote import DEFAULT_URL, Admin, Key, Url

app = typer.Typer(help="Look at cases of flagged requests and ask for a repair.", no_args_is_help=True)


@app.command("list", epilog="Example: headguard cases list --state open")
def list_cases(
    state: Annotated[str | None, typer.Option(help="Only cases in this state (open, closed, …).")] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Cases, newest first."""
    found = Admin(url, key).get("cases", state=state)["cases"]
    table(found, ["id", "state", "revision", "flags", "dropped", "opened_at"], as_json, "no cases")


@app.command("show", epilog="Example: headguard cases show 1")
def show_case(
    case: Annotated[str, typer.Argument(help="Number of the case.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """One case: its flagged requests (redacted), where heads looked, which heads."""
    found = Admin(url, key).get(f"cases/{case}")
    if as_json:
        show(found, True)
        return
    requests = found.pop("requests", [])
    show(found, False)
    print()
    rows = [
        {
            **request["verdict"],
            "request_id": request["request_id"],
            "action": request["action"],
            "looked_at": " | ".join(s.get("text") or f"{s['start']}–{s['end']}" for s in request["verdict"]["spans"]),
        }
        for request in requests
    ]
    table(rows, ["request_id", "p_value", "signal", "step", "action", "looked_at"], False, "no requests kept")


@app.command(epilog="Example: headguard cases words case-1 req-1")
def words(
    case: Annotated[str, typer.Argument(help="Number of the case.")],
    request: Annotated[str, typer.Argument(help="One of its requests.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """The words that a flag hangs on: asks the engine again, once without each word of the prompt."""
    found = Admin(url, key).call("POST", f"cases/{case}/requests/{request}/words", json={})
    if as_json:
        show(found, True)
        return
    table(found["words"], ["text", "weight"], False, "no word makes a difference to the guard")


@app.command(epilog="Example: headguard cases repair 1")
def repair(
    case: Annotated[str, typer.Argument(help="Number of the case.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Ask the clinic to repair the revision of a case; an approver other than you decides on the result."""
    show(Admin(url, key).call("POST", f"cases/{case}/repair", json={}), as_json)


@app.command(epilog="Example: headguard cases repairs --state offered")
def repairs(
    state: Annotated[
        str | None, typer.Option(help="requested, running, offered, refused, failed, approved, rejected.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Repairs and where they stand."""
    found = Admin(url, key).get("repairs", state=state)["repairs"]
    table(
        found,
        ["id", "case", "state", "requested_by", "decided_by", "candidate_revision", "metrics", "reasons"],
        as_json,
        "no repairs",
    )


@app.command(epilog="Example: headguard cases close 1 --comment 'false alarm'")
def close(
    case: Annotated[str, typer.Argument(help="Number of the case.")],
    comment: Annotated[str, typer.Option(help="Why; goes into the audit log.")] = "",
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Close a case without a repair."""
    show(Admin(url, key).call("POST", f"cases/{case}/close", json={"comment": comment}), as_json)
