"""Work in a thread that ends with it, so that torch's threads for it end too.

Every thread that has computed in parallel once keeps a team of OpenMP threads. libgomp counts the threads of all teams
in the process; when they outnumber the processors, threads stop spinning while they wait for work
(`gomp_throttled_spin_count_var`, libgomp/env.c), and each of the thousand small parallel regions of a forward pass
begins with waking a thread. With one other team alive, a pass over one row took 1.7 to 2.7 times as long (2 cores).
Loading and other work beside the thread that runs forward passes therefore runs in a thread of its own that ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_OPENMP_LIBRARIES = ("libgomp", "libiomp5", "libomp")


def run_in_short_lived_thread(call: Callable[[], T]) -> T:
    """Returns or raises what `call` does, after the thread that it ran in has ended.

    The thread has the caller's context variables, which the log uses for request and job ids.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="short-lived") as thread:
        return thread.submit(copy_context().run, call).result()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets the number of threads that this thread's torch operations are divided among.

    Other threads keep theirs: torch.set_num_threads would also set that of threads that start meanwhile.
    """
    before, openmp, mkl = torch.get_num_threads(), openmp_runtime(), _mkl()
    if count == before or openmp is None:
        yield
        return
    openmp.omp_set_num_threads(count)
    # MKL obeys OpenMP only until somebody has called torch.set_num_threads. 0, its value before, means that it does.
    mkl_before = mkl.MKL_Set_Num_Threads_Local(count) if mkl is not None else 0
    try:
        yield
    finally:
        openmp.omp_set_num_threads(before)
        if mkl is not None:
            mkl.MKL_Set_Num_Threads_Local(mkl_before)


@lru_cache(maxsize=1)
def openmp_runtime() -> ctypes.CDLL | None:
    """Returns the OpenMP library that torch uses, with its symbols made global; None if there is none or several."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {
                line.split()[-1] for line in maps if any(f"/{name}" in line for name in _OPENMP_LIBRARIES)
            }
        return ctypes.CDLL(paths.pop(), mode=ctypes.RTLD_GLOBAL) if len(paths) == 1 else None
    except OSError:
        return None


@lru_cache(maxsize=1)
def _mkl() -> ctypes.CDLL | None:
    """Returns the library that holds torch's MKL; None where torch was built without it."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not (torch.backends.mkl.is_available() and library.is_file()):  # type: ignore[no-untyped-call]
        return None
    loaded = ctypes.CDLL(str(library))
    return loaded if hasattr(loaded, "MKL_Set_Num_Threads_Local") else None
