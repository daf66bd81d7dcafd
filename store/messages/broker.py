"""The broker: names of tasks and queues, Celery settings, and the Redis keys of workers' metrics."""

from __future__ import annotations

from enum import StrEnum
from urllib.parse import parse_qs, urlsplit

from celery import Celery
from redis import Redis


class Task(StrEnum):
    PREPARE = "heft.prepare"  #: Checks a job's files, then queues the job. args: job id
    TRAIN = "heft.train"  #: Claims a job and trains it. args: job id
    EXPORT = "heft.export"  #: Builds an archive. args: model id, format
    PREDICT = "heft.predict"  #: args: one PredictMessage
    GENERATE = "heft.generate"  #: args: one GenerateMessage

    @property
    def queue(self) -> str:
        """The task's queue: `prepare`, `train`, `export` or `predict`, which carries all requests to models."""
        return "predict" if self is Task.GENERATE else self.value.removeprefix("heft.")


_TIMEOUT_SECONDS = 3
METRICS_PREFIX = "heft:metrics:"
METRICS_SECONDS = 60  #: the expiry of a worker's metrics in Redis


def metrics_key(worker_id: str) -> str:
    """Returns the Redis key of a worker's metrics, which are in Prometheus's text format."""
    return f"{METRICS_PREFIX}{worker_id}"


def make_celery(redis_url: str, *, name: str = "heft") -> Celery:
    """Returns the Celery app of any process, with queues and settings but without tasks.

    It has no results, ETAs or time limits, and does not retry a publish: a frozen broker costs its caller 3 s, not
    10 min.
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
            "socket_timeout": _TIMEOUT_SECONDS,
            "socket_connect_timeout": _TIMEOUT_SECONDS,
            "health_check_interval": 10,
            "client_name": name,
        },
        # Training needs no broker: a restart of it must not end a job.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def connect_redis(redis_url: str) -> Redis:
    """Returns a client that gives up on an answer as soon as `make_celery`'s does."""
    url = redis_py_url(redis_url)
    return Redis.from_url(url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS)


def redis_py_url(redis_url: str) -> str:
    """Returns Celery's URL in redis-py's form: `redis+socket://<path>?virtual_host=0` becomes `unix://<path>?db=0`."""
    if not redis_url.startswith("redis+socket:"):
        return redis_url
    parts = urlsplit(redis_url)
    database = parse_qs(parts.query).get("virtual_host", ["0"])[0].lstrip("/")
    return f"unix://{parts.netloc}{parts.path}?db={database}"
