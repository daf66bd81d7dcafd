"""The store's functions for async code: each in a transaction of its own, on a thread, within a deadline.

A frozen Postgres is not a closed connection: psycopg waits for as long as the kernel lets it, whatever
timeouts it was given. So nobody waits for the thread longer than the deadline, and a transaction that nobody
waits for any more rolls back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from store.database import transaction
from store.errors import Unavailable
from store.logs import in_context

P = ParamSpec("P")
T = TypeVar("T")


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
        abandoned = threading.Event()

        def run() -> T:
            with transaction(self._sessions) as session:
                result = work(session, *args, **kwargs)
                if abandoned.is_set():
                    raise Unavailable("answered too late")  # rolls back: its caller was told that it failed
                return result

        try:
            waiting = asyncio.get_running_loop().run_in_executor(self._threads, in_context(run))
            return await asyncio.wait_for(waiting, self._deadline)
        except TimeoutError as fault:
            raise Unavailable("the database does not answer; nothing was changed") from fault
        finally:
            abandoned.set()

    def close(self) -> None:
        """Wait for no one: what is still running rolls back or has been committed."""
        self._threads.shutdown(wait=False, cancel_futures=True)
