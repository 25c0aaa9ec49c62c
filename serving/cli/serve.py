"""`headguard serve`: the gateway, with an engine started for it (embedded in its process, or vLLM as a child process)
or engines that run already, and the repair worker as a child process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "serve",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Example: headguard serve build/lab/base --state-dir STATE --clean clean/ --port 8000 ·"
        " headguard serve --engine vllm MODEL --dtype bfloat16 --max-num-seqs 64 ·"
        " headguard serve MODEL --engine-url http://a:8001 --engine-url http://b:8001",
    )(serve)


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder of the base model (Hugging Face format, safetensors).")],
    engine: Annotated[
        Literal["embedded", "vllm"],
        typer.Option(help="Engine to start. What follows MODEL and is not an option of ours goes to vLLM."),
    ] = "embedded",
    state_dir: Annotated[Path | None, typer.Option(help="Folder for database, adapters, keys, repairs.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML); see docs/settings.md.")] = None,
    served_name: Annotated[str | None, typer.Option(help="Public name of the base.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    engine_url: Annotated[
        list[str] | None, typer.Option(help="Address of an engine that runs already; again for each further one.")
    ] = None,
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
        engine_url=engine_url or None, vaccine=vaccine,
    )  # fmt: skip
    started_here = not settings.engine_url
    if context.args and not (started_here and engine == "vllm"):
        raise typer.BadParameter(f"{context.args[0]!r} is not an option of headguard serve; vLLM's need --engine vllm.")
    if engine == "vllm" and not started_here:
        raise typer.BadParameter("--engine starts an engine and --engine-url names one that runs: give one of them.")
    log_as_json(settings.log_level)
    if clean is not None:
        read_rows(clean)
    # uvicorn hands a signal on when it has shut down; whatever was started here must still be stopped then.
    signal.signal(signal.SIGTERM, _leave)
    if settings.engine_url:
        engines = _remote(settings)
    elif engine == "vllm":
        engines = _vllm(settings, context.args)
    else:
        engines = _embedded(settings, max_slots, max_len, threads)
    with engines as client, _worker(settings, config, clean):
        app = create_gateway(settings, client)
        uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", timeout_graceful_shutdown=5)


def _leave(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def _remote(settings: Any) -> Iterator[Any]:
    """Engines that run already."""
    from serving.engines.client import EngineClient
    from serving.engines.pool import EnginePool

    key = settings.engine_key
    headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key is not None else None
    yield EnginePool(
        [EngineClient(url, timeout_s=settings.request_timeout_s, headers=headers) for url in settings.engine_url]
    )


@contextmanager
def _embedded(settings: Any, max_slots: int, max_len: int | None, threads: int | None) -> Iterator[Any]:
    """The embedded engine, in this process."""
    import torch

    from serving.engines.client import EngineClient
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
def _vllm(settings: Any, arguments: Sequence[str]) -> Iterator[Any]:
    """vLLM with the guard's plugin, in a child process that ends with this one."""
    from serving.cli.output import waiting
    from serving.engines.client import EngineClient
    from serving.engines.vllm.launcher import VllmServer

    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_file = settings.state_dir / "logs" / "vllm.log"
    server = VllmServer(settings.model, settings.served_name, arguments, log_file)
    with waiting(f"vLLM starts (log: {log_file})") as tick:
        server.start(tick)
    try:
        headers = {"authorization": f"Bearer {server.key}"}
        yield EngineClient(server.url, timeout_s=settings.request_timeout_s, headers=headers)
    finally:
        server.close()


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
