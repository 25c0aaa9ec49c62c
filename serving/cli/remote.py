"""The operator's side of the gateway's admin routes: where it is, who asks, and errors told in its words."""

from __future__ import annotations

from typing import Annotated, Any

import httpx
import typer

from serving.cli.output import Failure

Url = Annotated[str, typer.Option("--url", envvar="HEADGUARD_URL", help="Address of the gateway.")]
Key = Annotated[
    str, typer.Option("--key", envvar="HEADGUARD_KEY", help="API key; better given as an environment variable.")
]
DEFAULT_URL = "http://127.0.0.1:8000"


class Admin:
    """One gateway, one key. Every call returns the JSON answer, or raises Failure with the gateway's own message."""

    def __init__(self, url: str, key: str) -> None:
        if not key:
            raise Failure("no API key: set HEADGUARD_KEY (first start writes keys to STATE_DIR/keys.json).")
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/admin/", headers={"authorization": f"Bearer {key}"}, timeout=600.0
        )

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """``arguments`` are httpx's: json, params, files, content."""
        try:
            answer = self._http.request(method, path.lstrip("/"), **arguments)
        except httpx.HTTPError as error:
            raise Failure(
                f"no gateway answers at {self._http.base_url}: {error}. Is `headguard serve` running?"
            ) from error
        try:
            body = answer.json()
        except ValueError:
            body = {}
        if answer.is_error:
            told = body.get("error", {}).get("message") if isinstance(body, dict) else None
            raise Failure(f"{told or answer.reason_phrase} (HTTP {answer.status_code})")
        return body

    def get(self, path: str, **params: Any) -> Any:
        """GET with query parameters; those that are None are left out."""
        return self.call("GET", path, params={k: v for k, v in params.items() if v is not None})
