"""`headguard serve`: the gateway, with the embedded engine in its process and the repair worker in a child process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", epilog="Example: headguard serve build/lab/base --state-dir STATE --clean clean/ --port 8000")(
        serve
    )


def serve(
    model: Annotated[Path, typer.Argument(help="Folder of the base model (Hugging Face format, safetensors).")],
    state_dir: Annotated[Path | None, typer.Option(help="Folder for database, adapters, keys, repairs.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML); see docs/settings.md.")] = None,
    served_name: Annotated[str | None, typer.Option(help="Public name of the base.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    engine_url: Annotated[str | None, typer.Option(help="Address of an engine that runs already.")] = None,
    clean: Annotated[
        Path | None, typer.Option(help="Clean rows for repairs; with them, `headguard worker` runs as a child process.")
    ] = None,
    vaccine: Annotated[
        Path | None, typer.Option(help="Vaccine of the base, for the profiles of repaired adapters.")
    ] = None,
    max_slots: Annotated[int, typer.Option(help="Requests that the embedded engine runs at once.", min=1)] = 32,
    max_len: Annotated[int | None, typer.Option(help="Longest context of the embedded engine, tokens.", min=2)] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the embedded engine (default: all).", min=1)
    ] = None,
) -> None:
    """Serve a base model and its adapters behind the guard, OpenAI-compatible."""
    import uvicorn

    from guard.rows import read_rows
    from serving.app import create_gateway
    from serving.logs import log_as_json
    from serving.settings import load_settings

    settings = load_settings(
        config, model=model, state_dir=state_dir, served_name=served_name, host=host, port=port,
        engine_url=engine_url, vaccine=vaccine,
    )  # fmt: skip
    log_as_json(settings.log_level)
    if clean is not None:
        read_rows(clean)
    with _engine(settings, max_slots, max_len, threads) as engine, _worker(settings, config, clean):
        app = create_gateway(settings, engine)
        uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", timeout_graceful_shutdown=5)


@contextmanager
def _engine(settings: Any, max_slots: int, max_len: int | None, threads: int | None) -> Iterator[Any]:
    """A client of the engine: a remote one by URL, or the embedded one in this process."""
    from serving.engines.client import EngineClient

    if settings.engine_url:
        yield EngineClient(settings.engine_url, timeout_s=settings.request_timeout_s)
        return
    import torch

    from serving.engines.embedded.app import create_engine_app
    from serving.engines.embedded.engine import EmbeddedEngine
    from serving.engines.transport import InProcessTransport

    if threads is not None:
        torch.set_num_threads(threads)
    engine = EmbeddedEngine(settings.model, settings.served_name, max_slots=max_slots, max_len=max_len).start()
    try:
        transport = InProcessTransport(create_engine_app(engine))
        yield EngineClient(transport=transport, timeout_s=settings.request_timeout_s)
    finally:
        engine.close()


@contextmanager
def _worker(settings: Any, config: Path | None, clean: Path | None) -> Iterator[None]:
    """The repair worker as a child process, so that training never competes for this process's interpreter."""
    if clean is None:
        yield
        return
    command = [
        sys.executable, "-m", "serving", "worker", str(settings.model), "--clean", str(clean),
        "--state-dir", str(settings.state_dir), "--child",
        *(["--vaccine", str(settings.vaccine)] if settings.vaccine else []),
        *(["--config", str(config)] if config else []),
    ]  # fmt: skip
    child = subprocess.Popen(command)
    try:
        yield
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
