"""`headguard approve`: the second pair of eyes. Whoever asked for a repair cannot approve it."""

from __future__ import annotations

from typing import Annotated

import typer

from serving.cli.output import AsJson, show
from serving.cli.remote import DEFAULT_URL, Admin, Key, Url


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("approve", epilog="Example: HEADGUARD_KEY=$APPROVER_KEY headguard approve 1 --comment 'report read'")(
        approve
    )


def approve(
    repair: Annotated[str, typer.Argument(help="Number of the repair (see `headguard cases repairs`).")],
    reject: Annotated[bool, typer.Option("--reject", help="Reject it instead.")] = False,
    swap: Annotated[bool, typer.Option(help="Serve the repaired revision at once.")] = True,
    comment: Annotated[str, typer.Option(help="Why; goes into the audit log.")] = "",
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Approve (or reject) a repaired adapter after reading its report; approving swaps it in."""
    verb = "reject" if reject else "approve"
    params = {} if reject else {"swap": str(swap).lower()}
    answer = Admin(url, key).call("POST", f"repairs/{repair}/{verb}", params=params, json={"comment": comment})
    show(answer, as_json)
