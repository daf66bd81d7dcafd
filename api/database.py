"""Runs the store's functions for async code: each in its own transaction, in a thread, with a deadline.

A frozen Postgres is not a closed connection: psycopg waits as long as the kernel does, whatever its timeouts. So a
request waits no longer than the deadline, and the transaction of a request that has given up rolls back, unless its
COMMIT has been sent already: then the request fails with the message that the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from store.db.session import transaction
from store.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")


_UNKNOWN = (
    "the database does not answer, and the request may or may not have been carried out: check, or retry it with the "
    "same Idempotency-Key"
)


class _CommitDecision:
    """Decides, once and under a lock, whether a transaction commits or has been abandoned by its request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commits: bool | None = None

    def commit(self) -> bool:
        """Called before COMMIT. False if the request has given up: the transaction must roll back."""
        with self._lock:
            self._commits = self._commits is None
            return self._commits

    def abandon(self) -> bool:
        """Called when the request stops waiting. True if the transaction is committing already."""
        with self._lock:
            if self._commits is None:
                self._commits = False
            return self._commits


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
        decision = _CommitDecision()

        def run() -> T:
            with transaction(self._sessions) as session:
                result = work(session, *args, **kwargs)
                if not decision.commit():
                    raise Unavailable("the request has timed out")  # rolls back
                return result

        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, run)
            return await asyncio.wait_for(future, self._deadline)
        except TimeoutError as fault:
            message = _UNKNOWN if decision.abandon() else "the database does not answer; nothing was changed"
            raise Unavailable(message) from fault
        finally:
            decision.abandon()

    def close(self) -> None:
        """Does not wait: running transactions roll back or have been committed."""
        self._threads.shutdown(wait=False, cancel_futures=True)
