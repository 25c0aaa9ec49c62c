"""The databases that a test runs on: SQLite always, PostgreSQL where HEADGUARD_TEST_POSTGRES_URL names a server."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, make_url, text

VARIABLE = "HEADGUARD_TEST_POSTGRES_URL"
BOTH = ["sqlite", "postgresql"]


@contextmanager
def database(kind: str) -> Iterator[str | None]:
    """The URL of a fresh database (None: the gateway's own SQLite file); dropped afterwards."""
    if kind == "sqlite":
        yield None
        return
    server = os.environ.get(VARIABLE)
    if not server:
        pytest.skip(f"no PostgreSQL here: set {VARIABLE}=postgresql+psycopg://user@host/database to run this on one")
    name = f"headguard_test_{secrets.token_hex(4)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()
