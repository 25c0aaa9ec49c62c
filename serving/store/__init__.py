"""What the gateway remembers: tables, their migrations, and short transactions over SQLite or PostgreSQL."""

from serving.store.database import Store, now

__all__ = ["Store", "now"]
