"""`headguard worker`: make the repairs that operators ask the gateway for."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("worker", epilog="Example: headguard worker BASE --state-dir STATE --clean clean/")(worker)


def worker(
    model: Annotated[Path, typer.Argument(help="Folder of the base model, the one the gateway serves.")],
    clean: Annotated[Path, typer.Option(help="File or folder of clean {instruction, input, output} rows.")],
    state_dir: Annotated[Path | None, typer.Option(help="The gateway's state folder.")] = None,
    config: Annotated[Path | None, typer.Option(help="The gateway's settings file (TOML).")] = None,
    vaccine: Annotated[Path | None, typer.Option(help="Vaccine of the base, for candidates' profiles.")] = None,
    child: Annotated[
        bool, typer.Option(hidden=True, help="Stop when the process that started this one is gone.")
    ] = False,
) -> None:
    """Serve repairs until stopped. Killed in the middle of one, it goes on there when started again."""
    from guard.rows import read_rows
    from serving.logs import log_as_json
    from serving.settings import load_settings
    from serving.worker import Worker

    settings = load_settings(config, model=model, state_dir=state_dir, vaccine=vaccine)
    log_as_json(settings.log_level)
    read_rows(clean)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if child:
        threading.Thread(target=_stop_when_orphaned, args=(stop,), daemon=True).start()
    try:
        Worker(settings, clean).run(stop)
    finally:
        # A repair in the middle of a step would keep the interpreter alive for minutes; it is durable, so end here.
        if stop.is_set():
            os._exit(0)


def _stop_when_orphaned(stop: threading.Event) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        if stop.wait(1.0):
            return
    stop.set()
