"""The Celery worker of each role: pool, queues and prefetch, on the settings that `store.messages.broker` shares.

Threads pools everywhere: under prefork a task process is daemonic and SIGTERM does not reach the task. The
training worker takes one message at a time off the queue, since a message that waits behind a job of hours
helps nobody; the inference worker must prefetch, or its 64 threads see a fifth of the requests.

It does NOT know what the tasks do (worker.tasks), nor anything of jobs.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from celery import Celery, signals
from celery.exceptions import SecurityWarning
from kombu.transport.virtual import base as virtual

from store.messages.broker import Task, make_celery

log = logging.getLogger(__name__)


class Role(StrEnum):
    TRAIN = "train"  #: Trains one job at a time, in a child process.
    PREPARE = "prepare"  #: Checks files before a job is queued, and builds exports.
    INFERENCE = "inference"  #: Holds models, answers /predict and writes text.


@dataclass(frozen=True, kw_only=True)
class Pool:
    tasks: tuple[Task, ...]
    threads: int
    prefetch: bool
    #: Whether a message that a dead worker had taken comes back. Redis has no such thing: Celery writes each message
    #: down and strikes it out again, which took most of its time (2.5 ms of processor a message, measured). A question
    #: that comes back finds nobody who waits. One that ends in order puts back what it has not begun, behind others.
    restored: bool = True


POOLS = {
    Role.TRAIN: Pool(tasks=(Task.TRAIN,), threads=1, prefetch=False),
    Role.PREPARE: Pool(tasks=(Task.PREPARE, Task.EXPORT), threads=2, prefetch=False),
    Role.INFERENCE: Pool(tasks=(Task.PREDICT, Task.GENERATE), threads=64, prefetch=True, restored=False),
}


def worker_app(redis_url: str, role: Role) -> Celery:
    """The Celery app that a worker of this role runs; its tasks are registered by `worker.tasks`."""
    app = make_celery(redis_url, name=f"heft-{role}")
    pool = POOLS[role]
    app.conf.update(
        worker_concurrency=pool.threads,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=not pool.prefetch,
        broker_transport_options={**app.conf.broker_transport_options, "ack_emulation": pool.restored},
    )
    if not pool.restored:
        # What can't be put back, kombu writes to a file that nobody removes: users' rows.
        virtual.emergency_dump_state = _lose
    return app


def _lose(messages: Sequence[Any], **_: Any) -> None:
    log.warning("%d requests are lost: the broker is away", len(messages))


def run_worker(app: Celery, role: Role, *, worker_id: str, stopping: threading.Event, log_level: str) -> None:
    """Consume the role's queues until SIGTERM or SIGINT; `stopping` is set the moment that one arrives."""

    def shutting_down(**_: Any) -> None:
        stopping.set()

    # Celery warns of root because of pickle; these workers accept JSON alone, and containers run as root.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    # Celery tells of each task when it comes and when it goes: two lines a question would flood the log.
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signals.worker_shutting_down.connect(shutting_down, weak=False)
    queues = ",".join(sorted({task.queue for task in POOLS[role].tasks}))
    command = f"--quiet worker --pool threads --queues {queues} --hostname {worker_id} --loglevel {log_level}"
    # Workers need not know each other: Postgres says who is there.
    app.worker_main([*command.split(), "--without-mingle", "--without-gossip", "--without-heartbeat"])
