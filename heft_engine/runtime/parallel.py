"""Parts of a pass side by side on a CPU, each on a thread that computes alone.

A pass is a thousand small operations, and torch divides every one of them among all threads, which then wait for one
another: two cores get two thirds of what they give when each takes half of the rows for itself (and keeps them in its
own cache). So rows are dealt out among lanes, as many as torch has threads; one row alone is computed by all of them.

It does NOT know rows or models: jobs go in, results come out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

from heft_engine.runtime.threads import openmp_runtime, torch_threads

T = TypeVar("T")

#: Between two operations a lane holds Python's lock: more lanes than this would wait for it.
MOST = 8
_here = threading.local()


def count(device: torch.device) -> int:
    """How many lanes there are for this thread's work; 1 where rows are not dealt out."""
    if device.type != "cpu" or is_lane() or openmp_runtime() is None:
        return 1
    return min(MOST, torch.get_num_threads())


def threads_of_a_lane() -> int:
    """What each computes with, where there are several."""
    threads = torch.get_num_threads()
    return threads // min(MOST, threads)


def run(jobs: Sequence[Callable[[], T]], device: torch.device, *, alone: bool = True) -> list[T]:
    """What they return, in order; a single one on this thread, with all its threads, unless `alone` is false.

    Raises what the first of them raised; those that had not begun are left, the others have ended then.
    """
    lanes = count(device)
    if (len(jobs) < 2 and alone) or lanes < 2:
        return [job() for job in jobs]
    futures = [_threads(lanes, threads_of_a_lane()).submit(job) for job in jobs]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    failed = [fault for future in futures if not future.cancelled() and (fault := future.exception())]
    if failed:
        raise failed[0]
    return [future.result() for future in futures]


def pieces(sizes: Sequence[int], lanes: int, most: int) -> int:
    """How many to make of rows of these sizes: one for each lane, or so many for each that none is much larger than
    `most`."""
    return min(len(sizes), lanes * -(-sum(sizes) // (lanes * most)))


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The rows of each of so many pieces, about equally large: the largest row first, each to the smallest piece."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        least = held.index(min(held))
        dealt[least].append(row)
        held[least] += sizes[row]
    return [sorted(piece) for piece in dealt if piece]


def cut(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The same of neighbours, which want to stay together."""
    whole, reached = sum(sizes), 0
    found: list[list[int]] = [[]]
    for row, size in enumerate(sizes):
        # A piece ends with the row that comes closest to its share.
        goal = whole * len(found) / count
        if found[-1] and reached + size - goal > goal - reached and len(found) < count:
            found.append([])
        found[-1].append(row)
        reached += size
    return found


def is_lane() -> bool:
    """Whether this thread is one."""
    return getattr(_here, "is_lane", False)


@lru_cache(maxsize=1)
def _threads(lanes: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(lanes, "lane", _begin, (threads,))


def _begin(threads: int) -> None:
    _here.is_lane = True
    torch.get_num_threads()  # torch sets a thread's number when it is first asked for it
    _here.threads = torch_threads(threads)
    _here.threads.__enter__()
