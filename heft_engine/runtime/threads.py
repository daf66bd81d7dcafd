"""Work in a thread that ends with it, so that torch's threads for it end too.

Every thread that has once computed in parallel keeps a team of OpenMP's for good. libgomp counts the threads of all
teams in the process, and as soon as they are more than the processors, no team waits for its next piece of work
awake (`gomp_throttled_spin_count_var`, libgomp/env.c): each of a pass's thousand small pieces then begins with waking a
thread. With one other team about, a pass over one row took 1.7 to 2.7 times as long (2 cores). So whoever computes
beside the thread of passes does it apart.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


def apart(call: Callable[[], T]) -> T:
    """What `call` returns or raises; the caller waits. The thread it ran in is gone then.

    It has the caller's context variables, by which logs know whose work this is.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as thread:
        return thread.submit(copy_context().run, call).result()
