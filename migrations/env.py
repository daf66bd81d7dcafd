"""Alembic's entry point. The connection, its transaction and its lock belong to `migrations.upgrade`."""

from __future__ import annotations

from alembic import context

from store.db.tables import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run `heft migrate`, or migrations.upgrade(url)")

context.configure(connection=connection, target_metadata=Base.metadata)
context.run_migrations()
