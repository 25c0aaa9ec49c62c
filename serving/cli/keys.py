"""`headguard keys`: API keys for clients and operators."""

from __future__ import annotations

from typing import Annotated

import typer

from serving.cli.output import AsJson, show, table
from serving.cli.remote import DEFAULT_URL, Admin, Key, Url

app = typer.Typer(help="API keys: add, list, revoke.", no_args_is_help=True)


@app.command("list", epilog="Example: headguard keys list")
def list_keys(url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Keys and their roles; the keys themselves are never shown again."""
    table(Admin(url, key).get("keys")["keys"], ["id", "owner", "role", "created_at", "revoked_at"], as_json, "no keys")


@app.command(epilog="Example: headguard keys add --owner grace --role approver")
def add(
    owner: Annotated[str, typer.Option(help="Who it is for; the audit log names them.")],
    role: Annotated[str, typer.Option(help="client, viewer, operator or approver.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Make a key; it is shown once."""
    show(Admin(url, key).call("POST", "keys", json={"owner": owner, "role": role}), as_json)


@app.command(epilog="Example: headguard keys revoke 3")
def revoke(
    number: Annotated[str, typer.Argument(help="Number of the key.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Make a key useless."""
    show(Admin(url, key).call("DELETE", f"keys/{number}"), as_json)
