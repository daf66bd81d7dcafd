"""The Celery worker of each role: its pool, queues and prefetch, on top of the settings in `store.messages.broker`.

All pools are threads: under prefork a task process is daemonic and SIGTERM does not reach the task. The training
worker does not prefetch, since a message that waits behind a job of hours helps nobody. The inference worker must:
without prefetch its 64 threads get a fifth of the requests.
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
    PREPARE = "prepare"  #: Validates files before a job is queued, builds exports, compares studies.
    INFERENCE = "inference"  #: Loads models, answers predict and generate requests.


@dataclass(frozen=True, kw_only=True)
class Pool:
    tasks: tuple[Task, ...]
    threads: int
    prefetch: bool
    #: Whether kombu stores each unacknowledged message in Redis, to deliver it again if the worker dies. That took
    #: most of Celery's time (2.5 ms of CPU a message, measured), and nobody waits for a request that comes back. A
    #: worker that shuts down in order requeues the messages that it has not started either way.
    ack_emulation: bool = True


POOLS = {
    Role.TRAIN: Pool(tasks=(Task.TRAIN,), threads=1, prefetch=False),
    Role.PREPARE: Pool(tasks=(Task.PREPARE, Task.EXPORT), threads=2, prefetch=False),
    Role.INFERENCE: Pool(tasks=(Task.PREDICT, Task.GENERATE), threads=64, prefetch=True, ack_emulation=False),
}


def worker_app(redis_url: str, role: Role) -> Celery:
    """Returns the Celery app of this role; `worker.tasks` registers its tasks."""
    app = make_celery(redis_url, name=f"heft-{role}")
    pool = POOLS[role]
    app.conf.update(
        worker_concurrency=pool.threads,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=not pool.prefetch,
        broker_transport_options={**app.conf.broker_transport_options, "ack_emulation": pool.ack_emulation},
    )
    if not pool.ack_emulation:
        # kombu would write messages that it can't requeue, with users' rows, to a file that nobody removes.
        virtual.emergency_dump_state = _discard
    return app


def _discard(messages: Sequence[Any], **_: Any) -> None:
    log.warning("%d requests are lost: the broker is not reachable", len(messages))


def run_worker(app: Celery, role: Role, *, worker_id: str, stopping: threading.Event, log_level: str) -> None:
    """Consumes the role's queues until SIGTERM or SIGINT, and sets `stopping` as soon as one arrives."""

    def on_shutdown(**_: Any) -> None:
        stopping.set()

    # Celery warns against root because of pickle; these workers accept JSON alone, and containers run as root.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    # Celery logs when a task is received and when it succeeds: two lines a request would flood the log.
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signals.worker_shutting_down.connect(on_shutdown, weak=False)
    queues = ",".join(sorted({task.queue for task in POOLS[role].tasks}))
    command = f"--quiet worker --pool threads --queues {queues} --hostname {worker_id} --loglevel {log_level}"
    # Workers don't need each other's events: Postgres has the list of workers.
    app.worker_main([*command.split(), "--without-mingle", "--without-gossip", "--without-heartbeat"])
