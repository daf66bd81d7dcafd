"""The broker: task names, queues, the Celery settings of every process, and the keys of workers' metrics in Redis."""

from __future__ import annotations

from enum import StrEnum
from urllib.parse import parse_qs, urlsplit

from celery import Celery


class Task(StrEnum):
    PREPARE = "heft.prepare"  #: args: job id. Check the job's files, then queue it.
    TRAIN = "heft.train"  #: args: job id. Claim it and train.
    EXPORT = "heft.export"  #: args: model id, format. Build that archive.
    PREDICT = "heft.predict"  #: args: one PredictMessage.
    GENERATE = "heft.generate"  #: args: one GenerateMessage (store.messages.generate).

    @property
    def queue(self) -> str:
        """The queue that carries it: `prepare`, `train`, `export` or `predict`, which has all that asks a model."""
        return "predict" if self is Task.GENERATE else self.value.removeprefix("heft.")


#: A worker's metrics in Redis, in Prometheus's text format; they expire when it has put none there for so long.
METRICS_PREFIX = "heft:metrics:"
METRICS_SECONDS = 60


def metrics_key(worker_id: str) -> str:
    return f"{METRICS_PREFIX}{worker_id}"


def make_celery(redis_url: str, *, name: str = "heft") -> Celery:
    """The Celery app as every process of the service uses it. Knows names and queues; tasks are the worker's.

    No results, no ETA, no time limits, no retries inside a publish: a frozen broker costs its caller 3 s,
    not 10 min.
    """
    app = Celery(name, broker=redis_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_publish_retry=False,
        task_routes={task.value: {"queue": task.queue} for task in Task},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": 3,
            "socket_connect_timeout": 3,
            "health_check_interval": 10,
            "client_name": name,
        },
        # A restart of the broker must not end a job that trains well without it.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def redis_py_url(redis_url: str) -> str:
    """The same server as redis-py writes it: `redis+socket://<path>?virtual_host=0` is `unix://<path>?db=0`."""
    if not redis_url.startswith("redis+socket:"):
        return redis_url
    parts = urlsplit(redis_url)
    database = parse_qs(parts.query).get("virtual_host", ["0"])[0].lstrip("/")
    return f"unix://{parts.netloc}{parts.path}?db={database}"
