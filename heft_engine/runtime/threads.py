"""Work in a thread that ends with it, so that torch's threads for it end too.

Every thread that has computed in parallel once keeps a team of OpenMP threads. libgomp counts the threads of all teams
in the process; when they outnumber the processors, threads stop spinning while they wait for work
(`gomp_throttled_spin_count_var`, libgomp/env.c), and each of the thousand small parallel regions of a forward pass
begins with waking a thread. With one other team alive, a pass over one row took 1.7 to 2.7 times as long (2 cores).
Loading and other work beside the thread that runs forward passes therefore runs in a thread of its own that ends.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


def run_in_short_lived_thread(call: Callable[[], T]) -> T:
    """Returns or raises what `call` does, after the thread that it ran in has ended.

    The thread has the caller's context variables, which the log uses for request and job ids.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="short-lived") as thread:
        return thread.submit(copy_context().run, call).result()
