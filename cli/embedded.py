"""Postgres and Valkey of one machine, started together for one home and ending with their owner.

It does NOT know what they are used for: addresses come out, nothing else.
"""

from __future__ import annotations

import sys
from types import TracebackType

from cli.embedded_postgres import Postgres
from cli.embedded_valkey import Valkey
from cli.errors import CommandError
from cli.home import Home


class EmbeddedStack:
    """`with EmbeddedStack(Home.at(path)) as stack: stack.database_url, stack.redis_url`."""

    def __init__(self, home: Home, *, durable: bool = True) -> None:
        self.home = home
        self.postgres = Postgres(home, durable=durable)
        self.valkey = Valkey(home)

    @property
    def database_url(self) -> str:
        return self.postgres.url

    @property
    def redis_url(self) -> str:
        return self.valkey.url

    def start(self) -> None:
        """Both servers answer when this returns. Raises AlreadyRunning or CommandError."""
        if sys.platform != "linux":
            raise CommandError("the embedded servers need Linux: set HEFT_DATABASE_URL and HEFT_REDIS_URL")
        self.home.prepare()
        try:
            self.valkey.start()
            self.postgres.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.postgres.stop()
        self.valkey.stop()

    def __enter__(self) -> EmbeddedStack:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
