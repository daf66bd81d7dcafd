"""Chores of a worker process: small things done again and again beside its tasks. It does NOT know which."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from store.errors import StoreError

log = logging.getLogger(__name__)

#: A chore that is being done may end; one that takes longer is left behind with the process.
_LAST_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Chore:
    """`do` is called at once and then every `seconds`. A database or a storage that is away is tried again
    then."""

    name: str
    seconds: float
    do: Callable[[], None]


@contextmanager
def chores(todo: Sequence[Chore]) -> Iterator[None]:
    """Do the chores, each on a thread of its own, until the body ends."""
    over = threading.Event()
    threads = [
        threading.Thread(target=_run, args=(chore, over), name=chore.name, daemon=True) for chore in todo
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(_LAST_SECONDS)


def _run(chore: Chore, over: threading.Event) -> None:
    while True:
        try:
            chore.do()
        except StoreError as fault:
            log.warning("%s: %s", chore.name, fault)
        except Exception:
            # A chore that ended would be missed only when its work was: it tries again at its next turn.
            log.exception("%s failed", chore.name)
        if over.wait(chore.seconds):
            return
