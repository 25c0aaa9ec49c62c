"""Opening the database and doing short transactions in it, the same on SQLite and PostgreSQL.

``Store.write()`` and ``Store.read()`` are the only ways in. On SQLite a write begins IMMEDIATE (so two writers queue
instead of failing half-way), in WAL mode with foreign keys on. Migrations run at start, one process at a time.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from filelock import FileLock
from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.orm import Session

_MIGRATIONS = Path(__file__).parent / "migrations"
# Any fixed number: PostgreSQL's advisory lock under which one gateway at a time migrates.
_MIGRATION_LOCK = 7_401_522
_SQLITE_WAIT_S = 30


def now() -> float:
    """Seconds since 1970, UTC."""
    return time.time()


def new_id(kind: str) -> str:
    """A short random name such as ``case-5f2c9a1e07d3``."""
    return f"{kind}-{secrets.token_hex(6)}"


class Store:
    """An open database. Close it when the gateway stops."""

    def __init__(self, url: str, state_dir: Path | None = None) -> None:
        """Open (and, for SQLite, create) the database at the SQLAlchemy ``url``. Tables come with ``migrate``.

        ``state_dir`` is where the audit chain keeps its head file; without it none is kept.
        """
        self.state_dir = state_dir
        self._after_commit = threading.Lock()
        self.is_sqlite = make_url(url).get_backend_name() == "sqlite"
        if self.is_sqlite:
            path = make_url(url).database
            if not path or path == ":memory:":
                raise ValueError("the gateway's state must outlive it: give SQLite a file, not memory")
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._lock_path = f"{path}.migrate.lock"
            self.engine = create_engine(url, connect_args={"timeout": _SQLITE_WAIT_S, "check_same_thread": False})
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = create_engine(url, pool_pre_ping=True)

    def migrate(self) -> None:
        """Bring the tables to this version. Safe when several processes start at once."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        if self.is_sqlite:
            with FileLock(self._lock_path), self.engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
            return
        with self.engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block, or rolls back when it raises."""
        engine = self.engine.execution_options(headguard_write=True)
        hooks: list[Callable[[], None]] = []
        info = {"state_dir": self.state_dir, "after_commit": hooks}
        with Session(engine, expire_on_commit=False, info=info) as session, session.begin():
            yield session
        with self._after_commit:
            for hook in hooks:
                hook()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction for reading; nothing is kept of what is changed in it."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        """Give back all connections."""
        self.engine.dispose()


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, below: the driver's own comes too late for IMMEDIATE
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA secure_delete=ON")  # erased evidence is overwritten, not just unlinked
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("headguard_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
