"""Threads for the forward passes of a CPU, each of which computes alone.

torch divides every single operation among all threads, which then wait for one another: in a pass of a thousand small
operations two cores give two thirds of what they give when each takes half of the rows (and keeps them in its own
cache). It also makes results depend on the number of threads. So torch's operations run on one thread here, and threads
share whole pieces of work: `run_jobs` passes over different rows, `run_tasks` the parts of one operation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

from heft_engine.runtime.threads import openmp_runtime, torch_threads

T = TypeVar("T")

#: Between two operations a thread holds Python's lock: more jobs at a time than this would wait for it.
MOST_JOBS = 8


class _Thread(threading.local):
    #: Whether this thread runs a job of `run_jobs`.
    runs_job = False
    #: Threads that `run_tasks` may use, this one included.
    threads = 1


_this = _Thread()


def job_threads(device: torch.device) -> int:
    """Returns how many jobs `run_jobs` runs at a time: 1 on a GPU, inside a job, and without control over OpenMP."""
    if device.type != "cpu" or _this.runs_job or openmp_runtime() is None:
        return 1
    return min(MOST_JOBS, _available())


def run_jobs(jobs: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """Returns the jobs' results, in order. A single job runs on this thread and has all threads for its tasks.

    Raises the first job's exception; jobs that had not begun are cancelled, the others have ended by then.
    """
    at_once = job_threads(device)
    if len(jobs) < 2 or at_once < 2:
        return [job() for job in jobs]
    threads = _available() // at_once
    futures = [_pool("jobs", at_once).submit(_run_job, job, threads) for job in jobs]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        _end(futures)
    for future in futures:
        if not future.cancelled():
            future.result()
    return [future.result() for future in futures]


def run_tasks(tasks: Sequence[Callable[[], object]]) -> None:
    """Runs each task on one thread: on this one and, inside `one_thread`, on the others that it has.

    Which thread takes which task is chance. Raises a task's exception after all tasks that had begun have ended.
    """
    helpers = min(_this.threads, len(tasks)) - 1
    if helpers < 1:
        for task in tasks:
            task()
        return
    is_inference = torch.is_inference_mode_enabled()
    queue = iter(tasks)

    def work() -> None:
        with torch_threads(1), torch.inference_mode(is_inference):
            for task in queue:
                task()

    futures = [_pool("tasks", _this.threads - 1).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        _end(futures)
    for future in futures:
        if not future.cancelled():
            future.result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch's operations run on this thread alone, and `run_tasks` has all threads that they had before."""
    threads = torch.get_num_threads()
    if threads == 1 or openmp_runtime() is None:
        yield
        return
    before, _this.threads = _this.threads, threads
    try:
        with torch_threads(1):
            yield
    finally:
        _this.threads = before


@contextmanager
def all_threads() -> Iterator[None]:
    """Inside, operations are divided among all threads again, for those that give the same bits with any number."""
    with torch_threads(_available()):
        yield


def task_threads() -> int:
    """Returns how many threads `run_tasks` uses here."""
    return _this.threads


def _available() -> int:
    return max(torch.get_num_threads(), _this.threads)


def _run_job(job: Callable[[], T], threads: int) -> T:
    _this.runs_job = True
    with torch_threads(threads):
        return job()


def _end(futures: Sequence[Future[T]]) -> None:
    """Cancels what has not begun and waits for the rest."""
    for future in futures:
        future.cancel()
    wait(futures)


@lru_cache(maxsize=2)
def _pool(name: str, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, name)
