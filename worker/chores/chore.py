"""Periodic tasks of a worker process, run on threads beside its Celery tasks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from store.errors import StoreError

log = logging.getLogger(__name__)

#: A chore that is running may finish; one that takes longer is abandoned with the process.
_JOIN_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Chore:
    """A periodic task: `run` is called at once and then every `seconds`, whether or not the last call failed."""

    name: str
    seconds: float
    run: Callable[[], None]


@contextmanager
def run_chores(chores: Sequence[Chore]) -> Iterator[None]:
    """Runs the chores, each on a thread of its own, until the body ends."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=_loop, args=(chore, stop), name=chore.name, daemon=True) for chore in chores
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(_JOIN_SECONDS)


def _loop(chore: Chore, stop: threading.Event) -> None:
    while True:
        try:
            chore.run()
        except StoreError as error:
            log.warning("%s: %s", chore.name, error)
        except Exception:
            # A thread that ended would be noticed late: the chore runs again at its next turn.
            log.exception("%s failed", chore.name)
        if stop.wait(chore.seconds):
            return
