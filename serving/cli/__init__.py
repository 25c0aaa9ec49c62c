"""The `headguard` command: one file per noun, each command a thin client of the rooms below it.

Exit codes: 0 done, 1 the work failed (bad data, gate failed, a check that does not hold), 2 wrong usage. Every command
has ``--json`` for machines. What a running gateway must do is asked of it over HTTP (`remote`), never done behind its
back in the database.
"""

from __future__ import annotations

import sys

import typer

from serving.cli import adapters, approve, audit, calibrate, cases, demo, keys, purify, scan, serve, vaccinate, worker
from serving.cli.output import Failure

app = typer.Typer(
    name="headguard",
    help="Notices a backdoor when it fires, repairs the adapter, swaps the repaired one in; an operator decides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (demo, serve, vaccinate, calibrate, scan, purify, worker, approve):
    module.register(app)
app.add_typer(cases.app, name="cases")
app.add_typer(adapters.app, name="adapters")
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Entry point: errors made for people become one line on stderr and exit code 1."""
    from guard.errors import GuardError
    from serving.errors import ServingError
    from serving.settings import SettingsError

    try:
        app()
    except (Failure, GuardError, ServingError, SettingsError) as error:
        print(f"headguard: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
