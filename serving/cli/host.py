"""What is done on the gateway's own host, in its state folder, without asking the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from serving.cli.output import Failure

if TYPE_CHECKING:
    from serving.store.database import Store


@contextmanager
def opened(state_dir: Path, database_url: str | None) -> Iterator[Store]:
    """The database of a state folder, or the one at ``database_url``. Raises Failure when there is none."""
    from serving.store.database import Store

    path = state_dir.absolute() / "headguard.sqlite"
    if database_url is None and not path.is_file():
        raise Failure(f"{state_dir} holds no headguard.sqlite: give --state-dir or --database-url.")
    store = Store(database_url or f"sqlite:///{path}", state_dir.absolute())
    try:
        yield store
    finally:
        store.close()
