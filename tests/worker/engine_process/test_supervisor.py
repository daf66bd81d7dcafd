"""The supervisor: when it ends a child, and how."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from worker_bench import eventually

from store.errors import LostFence, Unavailable
from store.jobs.fence import StopRequest
from worker.engine_process.child import Child
from worker.engine_process.supervisor import Limits, StopReason, Supervisor

LIMITS = Limits(control=0.02, heartbeat=0.1, stall=60, cancel_grace=0.2, checkpoint_grace=30, dump_grace=0.1)
LISTENS = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print({}); time.sleep(99)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print({}); time.sleep(99)"


class Job:
    """A job's stop requests, in place of a database."""

    def __init__(self) -> None:
        self.cancel = self.pause = False
        self.fault: Exception | None = None
        self.renewed = self.read = 0

    def renew(self) -> StopRequest:
        self.renewed += 1
        return self.read_stop_request()

    def read_stop_request(self) -> StopRequest:
        self.read += 1
        if self.fault is not None:
            raise self.fault
        return StopRequest(cancel=self.cancel, pause=self.pause)


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def start(code: str) -> Child:
        child = Child([sys.executable, "-u", "-c", code], env={}, cwd=tmp_path)
        children.append(child)
        next(child.lines())
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


def supervise(job: Job, limits: Limits = LIMITS, stopping: threading.Event | None = None) -> Supervisor:
    return Supervisor(
        renew_lease=job.renew,
        read_stop_request=job.read_stop_request,
        stopping=stopping or threading.Event(),
        limits=limits,
    )


def test_it_renews_the_lease_less_often_than_it_reads_stop_requests(job: Job) -> None:
    with supervise(job):
        eventually(lambda: job.renewed == 3)
    assert job.read >= 6


def test_a_cancel_replaces_a_pause_and_never_the_reverse(job: Job, start: Callable[[str], Child]) -> None:
    child = start(DEAF)
    with supervise(job) as supervisor, supervisor.supervising(child):
        job.pause = True
        eventually(lambda: supervisor.stop_reason is StopReason.PAUSED)
        job.cancel = True
        assert child.wait() == -signal.SIGKILL, "the shorter grace period counts"
        job.cancel = False
        assert supervisor.stop_reason is StopReason.CANCELLED


def test_a_child_that_starts_after_the_stop_is_ended_at_once(job: Job, start: Callable[[str], Child]) -> None:
    stopping = threading.Event()
    stopping.set()
    with supervise(job, stopping=stopping) as supervisor:
        eventually(lambda: supervisor.stop_reason is StopReason.SHUTDOWN)
        child = start(LISTENS)
        with supervisor.supervising(child):
            assert child.wait() == 75


def test_an_outage_of_the_database_ends_nothing(job: Job, start: Callable[[str], Child]) -> None:
    job.fault = Unavailable("away")
    child = start(DEAF)
    with supervise(job) as supervisor, supervisor.supervising(child):
        eventually(lambda: job.read > 5)
        assert supervisor.stop_reason is None
        job.fault = LostFence("taken over meanwhile")
        assert child.wait() == -signal.SIGKILL
    assert supervisor.stop_reason is StopReason.LOST


def test_a_supervisor_that_raises_ends_its_child(job: Job, start: Callable[[str], Child]) -> None:
    child = start(DEAF)
    with supervise(job) as supervisor, supervisor.supervising(child):
        job.fault = RuntimeError("a bug")
        assert child.wait() == -signal.SIGKILL
    assert supervisor.stop_reason is StopReason.LOST


def test_a_child_without_output_is_stalled(job: Job, start: Callable[[str], Child]) -> None:
    limits = Limits(**{**vars(LIMITS), "stall": 0.3})
    child = start(DEAF)
    began = time.monotonic()
    with supervise(job, limits) as supervisor, supervisor.supervising(child):
        child.wait()
    assert supervisor.stop_reason is StopReason.STALLED
    assert time.monotonic() - began >= 0.3
