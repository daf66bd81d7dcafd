"""A private Postgres and Valkey without the other processes of `heft up`, for tests and tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cli.stack.home import Home
from cli.stack.postgres import Postgres
from cli.stack.valkey import Valkey


@dataclass(frozen=True, kw_only=True)
class EmbeddedStack:
    """Two running servers."""

    postgres: Postgres
    valkey: Valkey

    @property
    def database_url(self) -> str:
        return self.postgres.url

    @property
    def redis_url(self) -> str:
        return self.valkey.url


@contextmanager
def embedded_stack(home: Home, *, durable: bool = True) -> Iterator[EmbeddedStack]:
    """Runs both servers during the `with` block. Raises AlreadyRunning or CommandError."""
    with home.occupied():
        stack = EmbeddedStack(postgres=Postgres(home, durable=durable), valkey=Valkey(home))
        try:
            stack.valkey.start()
            stack.postgres.start()
            yield stack
        finally:
            stack.postgres.stop()
            stack.valkey.stop()
