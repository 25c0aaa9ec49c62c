"""`headguard audit`: read the audit chain and verify it, on the database itself and without a running gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.host import opened
from serving.cli.output import AsJson, show, table
from serving.cli.remote import DEFAULT_URL, Admin, Key, Url

app = typer.Typer(help="The append-only audit log.", no_args_is_help=True)


@app.command("list", epilog="Example: headguard audit list --limit 20")
def list_rows(
    after: Annotated[int, typer.Option(help="Only rows with a greater number.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="At most so many rows.", min=1, max=1000)] = 100,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """What was done, by whom, in order."""
    rows = Admin(url, key).get("audit", after=after, limit=limit)["rows"]
    table(rows, ["seq", "at", "actor", "action", "subject", "detail"], as_json, "no rows")


@app.command(epilog="Example: headguard audit verify --state-dir headguard-state")
def verify(
    state_dir: Annotated[Path, typer.Option(help="The gateway's state folder.")] = Path("headguard-state"),
    database_url: Annotated[
        str | None, typer.Option(envvar="HEADGUARD_DATABASE_URL", help="The database, when it is not the folder's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every hash of the chain; exit code 1 names the first row that does not fit."""
    from serving.audit import verify as check

    with opened(state_dir, database_url) as store, store.read() as session:
        report = check(session, state_dir.absolute())
    show(report.to_dict(), as_json)
    if not report.ok:
        raise SystemExit(1)
