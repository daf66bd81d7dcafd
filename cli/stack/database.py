"""The database of this machine for commands that need no running service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cli.errors import AlreadyRunning
from cli.stack.home import Home
from cli.stack.postgres import Postgres
from cli.stack.up import running_stack


@contextmanager
def database_of(home: Home, url: str | None) -> Iterator[str]:
    """Yields a database URL: `url`, the running stack's, or that of a server started for the `with` block."""
    if url:
        yield url
        return
    try:
        with home.occupied():
            postgres = Postgres(home)
            try:
                postgres.start()
                yield postgres.url
            finally:
                postgres.stop()
    except AlreadyRunning:
        stack = running_stack(home)
        if stack is None:  # it is starting or stopping
            raise
        yield stack.database_url
