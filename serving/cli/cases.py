"""`headguard cases`: what was flagged, gathered by revision, and the request to repair it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import punctuation
from typing import Annotated, Any

import typer
from tqdm import tqdm

from serving.cli.output import AsJson, Failure, show, table
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


@app.command(
    epilog="Example: headguard cases words case-1, or of one of its requests: headguard cases words case-1 req-1"
)
def words(
    case: Annotated[str, typer.Argument(help="Number of the case.")],
    request: Annotated[str | None, typer.Argument(help="One of its requests; without it, several together.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Flags to ask about where no request is named.")] = 10,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """The words that flags hang on: asks the engine again, once without each word of a prompt.

    Without a request, the case's first flags that nobody called a false alarm are asked about: what most of them hang
    on is what a trigger is made of, and what each hangs on alone is its own.
    """
    admin, none = Admin(url, key), "no word makes a difference to the guard"

    def ask(flag: str) -> dict[str, Any]:
        answer: dict[str, Any] = admin.call("POST", f"cases/{case}/requests/{flag}/words", json={})
        return answer

    if request is not None:
        found = ask(request)
        if as_json:
            show(found, True)
        else:
            table(found["words"], ["text", "weight"], False, none)
        return
    flags = [each["request_id"] for each in admin.get(f"cases/{case}")["requests"] if not each["excluded"]][:most]
    told, refused = [], []
    for flag in tqdm(flags, desc="flags", leave=False, disable=as_json):
        try:
            told.append(ask(flag)["words"])
        except Failure as failure:
            refused.append(failure)
    if refused and not told:
        raise refused[0]
    common = _common(told)
    if as_json:
        show({"flags": len(told), "refused": len(refused), "words": common}, True)
        return
    table(common, ["text", "flags", "weight"], False, none)
    print(f"\nof {len(told)} flags" + (f"; {len(refused)} more could not be asked about" if refused else ""))


def _common(told: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Words by how many flags hang on them, blind to case and punctuation; ``weight``: the mean over those flags."""
    found: dict[str, dict[str, Any]] = {}
    for words_of_one in told:
        for word in words_of_one:
            text = word["text"].strip(punctuation)
            same = found.setdefault(text.casefold(), {"text": text, "flags": 0, "weight": 0.0})
            same["flags"] += 1
            same["weight"] += (word["weight"] - same["weight"]) / same["flags"]
    return sorted(found.values(), key=lambda word: (-word["flags"], -word["weight"]))


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
