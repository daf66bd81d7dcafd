"""The database of this machine for commands that need no running service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cli.errors import AlreadyRunning
from cli.options import Target
from cli.stack.postgres import Postgres
from cli.stack.up import running_stack


@contextmanager
def database_of(target: Target) -> Iterator[str]:
    """Yields a database URL: the option's, the running stack's, or that of a server started for the `with` block."""
    if target.database_url:
        yield target.database_url
        return
    home = target.home
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
