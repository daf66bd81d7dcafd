"""The store's functions for async code: each in a transaction of its own, on a thread, within a deadline.

A frozen Postgres is not a closed connection: psycopg waits for as long as the kernel lets it, whatever
timeouts it was given. So nobody waits for the thread longer than the deadline, and a transaction that nobody
waits for any more rolls back, unless its COMMIT is on its way already: then the caller is told that nobody knows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from store.db.session import transaction
from store.errors import Unavailable
from store.logs import in_context

P = ParamSpec("P")
T = TypeVar("T")


_UNKNOWN = (
    "the database does not answer, and may or may not have done what was asked: look, or send the request again with "
    "the same Idempotency-Key"
)


class _Fate:
    """Whether a transaction still has somebody who waits for it when it comes to its COMMIT: asked once, under a
    lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decided: bool | None = None

    def may_commit(self) -> bool:
        with self._lock:
            self._decided = self._decided is None
            return self._decided

    def is_committing(self) -> bool:
        """For whoever stops waiting: if it is not by now, it never will."""
        self.abandon()
        return bool(self._decided)

    def abandon(self) -> None:
        with self._lock:
            if self._decided is None:
                self._decided = False


class Database:
    """`await database(jobs.get, job_id=…)` runs `jobs.get(session, job_id=…)` and commits.

    Raises what the function raises, and Unavailable when the database does not answer in `deadline` seconds.
    """

    def __init__(self, sessions: sessionmaker[Session], *, threads: int = 16, deadline: float = 4.0) -> None:
        self._sessions = sessions
        self._deadline = deadline
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="database")

    async def __call__(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        fate = _Fate()

        def run() -> T:
            with transaction(self._sessions) as session:
                result = work(session, *args, **kwargs)
                if not fate.may_commit():
                    raise Unavailable("answered too late")  # rolls back: its caller was told that it failed
                return result

        try:
            waiting = asyncio.get_running_loop().run_in_executor(self._threads, in_context(run))
            return await asyncio.wait_for(waiting, self._deadline)
        except TimeoutError as fault:
            told = _UNKNOWN if fate.is_committing() else "the database does not answer; nothing was changed"
            raise Unavailable(told) from fault
        finally:
            fate.abandon()

    def close(self) -> None:
        """Wait for no one: what is still running rolls back or has been committed."""
        self._threads.shutdown(wait=False, cancel_futures=True)
