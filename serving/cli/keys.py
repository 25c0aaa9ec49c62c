"""`headguard keys`: API keys for clients and operators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.host import opened
from serving.cli.output import AsJson, show, table
from serving.cli.remote import DEFAULT_URL, Admin, Key, Url

app = typer.Typer(help="API keys: add, list, revoke.", no_args_is_help=True)


@app.command("list", epilog="Example: headguard keys list")
def list_keys(url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Keys and their roles; the keys themselves are never shown again."""
    table(Admin(url, key).get("keys")["keys"], ["id", "owner", "role", "created_at", "revoked_at"], as_json, "no keys")


@app.command(epilog="Example: headguard keys add --owner grace --role approver --state-dir headguard-state")
def add(
    owner: Annotated[str, typer.Option(help="Who it is for; the audit log names them.")],
    role: Annotated[str, typer.Option(help="client, viewer, operator or approver.")],
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Issue it on the gateway's own host, in this state folder: the only way for an approver."),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Make a key; it is shown once."""
    if state_dir is None:
        show(Admin(url, key).call("POST", "keys", json={"owner": owner, "role": role}), as_json)
        return
    from serving.auth import issue

    with opened(state_dir, None) as store, store.write() as session:
        row, token = issue(session, owner, role)  # type: ignore[arg-type]
        made = {"id": row.id, "owner": owner, "role": role, "key": token}
    show(made, as_json)


@app.command(epilog="Example: headguard keys revoke 3")
def revoke(
    number: Annotated[str, typer.Argument(help="Number of the key.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Make a key useless."""
    show(Admin(url, key).call("DELETE", f"keys/{number}"), as_json)
