"""`headguard adapters`: admit revisions, give them profiles and policies, swap them, roll back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.output import AsJson, Failure, show, table
from serving.cli.remote import DEFAULT_URL, Admin, Key, Url

app = typer.Typer(help="Adapter revisions: add, list, policy, swap, rollback.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Public name of the adapter.")]
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@app.command("list", epilog="Example: headguard adapters list")
def list_adapters(url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Adapters, what each name serves now, and what it can roll back to."""
    found = Admin(url, key).get("adapters")["adapters"]
    table(found, ["alias", "live_revision", "previous_revision", "in_flight", "policy"], as_json, "no adapters")


@app.command(epilog="Example: headguard adapters add support ./my-lora --profile profile.safetensors --live")
def add(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="PEFT folder (adapter_config.json, adapter_model.safetensors).")],
    profile: Annotated[
        Path | None, typer.Option(help="Profile made by `headguard calibrate` for this adapter.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Swap to it at once.")] = False,
    allow_uncalibrated: Annotated[
        bool, typer.Option(help="With --live: go live without a profile (unscored!).")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Upload an adapter as a new revision; with a profile it is calibrated, with --live it is served."""
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise Failure(f"{folder} is not a folder with an adapter: expected {' and '.join(_FILES)}.")
    admin = Admin(url, key)
    parts = [("files", (path.name, path.open("rb"), "application/octet-stream")) for path in files]
    try:
        revision = admin.call("POST", f"adapters/{name}/revisions", files=parts)
    finally:
        for _, (_, file, _) in parts:
            file.close()
    if profile is not None:
        revision = admin.call("PUT", f"revisions/{revision['revision']}/profile", content=_bytes(profile))
    if live:
        body = {"revision": revision["revision"], "allow_uncalibrated": allow_uncalibrated}
        revision = {**revision, "swap": admin.call("POST", f"adapters/{name}/swap", json=body)}
    show(revision, as_json)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error}") from error


@app.command(epilog="Example: headguard adapters profile support@sha256-0123456789ab profile.safetensors")
def profile(
    revision: Annotated[str, typer.Argument(help="Revision (or the served base name).")],
    path: Annotated[Path, typer.Argument(help="Profile made by `headguard calibrate`.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Give a revision its profile; it is refused when it was fitted for anything else."""
    show(Admin(url, key).call("PUT", f"revisions/{revision}/profile", content=_bytes(path)), as_json)


@app.command(epilog="Example: headguard adapters policy support --mode block --window 16 --alpha 0.01 --fail closed")
def policy(
    name: Name,
    mode: Annotated[str | None, typer.Option(help="observe, block or reroute.")] = None,
    window: Annotated[str | None, typer.Option(help="prefill, a number of tokens, or all.")] = None,
    hold_back: Annotated[
        int | None, typer.Option(help="Tokens withheld until their verdict (default: the window).")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Accepted false-alarm rate per request.")] = None,
    fail: Annotated[str | None, typer.Option(help="open or closed: what happens to unscored requests.")] = None,
    reroute_to: Annotated[str | None, typer.Option(help="previous or base.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show or change how a name is guarded; what is not given stays."""
    admin = Admin(url, key)
    given = {
        "mode": mode,
        "window": int(window) if window and window.isdigit() else window,
        "hold_back": hold_back,
        "alpha": alpha,
        "fail": fail,
        "reroute_to": reroute_to,
    }
    changed = {field: value for field, value in given.items() if value is not None}
    adapter = admin.get(f"adapters/{name}")
    if changed:
        adapter = admin.call("PUT", f"adapters/{name}/policy", json={**adapter["policy"], **changed})
    show(adapter["policy"], as_json)


@app.command(epilog="Example: headguard adapters swap support support@sha256-0123456789ab")
def swap(
    name: Name,
    revision: Annotated[str, typer.Argument(help="Revision to serve under this name.")],
    allow_uncalibrated: Annotated[
        bool, typer.Option(help="Serve it without a profile: its requests stay unscored.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Serve another revision under a name: load, probe, flip, drain, unload. Running requests keep theirs."""
    body = {"revision": revision, "allow_uncalibrated": allow_uncalibrated}
    show(Admin(url, key).call("POST", f"adapters/{name}/swap", json=body), as_json)


@app.command(epilog="Example: headguard adapters rollback support")
def rollback(name: Name, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Go back to the revision that was served before."""
    show(Admin(url, key).call("POST", f"adapters/{name}/rollback", json={}), as_json)
