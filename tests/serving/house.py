"""The real gateway in a real server on a free port, over a real engine or a scripted peer that speaks its protocol."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from serving.app import create_gateway
from serving.engines.client import EngineClient
from serving.gateway import Gateway
from serving.settings import Settings


@dataclass
class House:
    """A running gateway: its address, its keys by role, and the object inside."""

    url: str
    keys: dict[str, str]
    gateway: Gateway

    def http(self, role: str | None = "client") -> httpx.Client:
        """A plain HTTP client with the key of a role (None: without one)."""
        headers = {"authorization": f"Bearer {self.keys[role]}"} if role else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def openai(self) -> openai.OpenAI:
        """The official client, as anybody would use it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys["client"], max_retries=0)

    def call(self, role: str, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """One request with the key of a role."""
        with self.http(role) as client:
            return client.request(method, path, **kwargs)

    def ok(self, role: str, method: str, path: str, **kwargs: Any) -> Any:
        """The JSON of a request that must succeed."""
        response = self.call(role, method, path, **kwargs)
        assert response.status_code < 300, response.text
        return response.json()

    def upload(self, alias: str, folder: Path) -> dict[str, Any]:
        """Upload a PEFT folder."""
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        return self.ok("operator", "POST", f"/admin/adapters/{alias}/revisions", files=files)

    def calibrate(self, revision: str, profile: Path) -> dict[str, Any]:
        """Upload a profile."""
        return self.ok("operator", "PUT", f"/admin/revisions/{revision}/profile", content=profile.read_bytes())

    def policy(self, alias: str, **policy: Any) -> dict[str, Any]:
        """Set a policy."""
        return self.ok("operator", "PUT", f"/admin/adapters/{alias}/policy", json=policy)


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an ASGI app on a free port of loopback; gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def open_house(settings: Settings, engine: EngineClient, **more: Any) -> Iterator[House]:
    """A gateway over ``engine``, with one more key: a viewer's."""
    app = create_gateway(settings, engine, **more)
    with running(app) as url:
        path = settings.state_dir / "keys.json"
        house = House(url, json.loads(path.read_text()), app.state.gateway)
        if "viewer" not in house.keys:
            made = house.ok("operator", "POST", "/admin/keys", json={"owner": "vera", "role": "viewer"})
            house.keys["viewer"] = made["key"]
        yield house
