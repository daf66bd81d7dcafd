"""Messages between API and workers: task names, queues, shared Celery settings, and hints that never block.

A message is a disposable hint: Postgres alone says what is to be done, a lost hint is sent again by the
reconciler and a doubled one loses the claim. So hints go out after the commit, from a thread of their own,
behind a circuit breaker, and are dropped without regret when the broker is away.

`/predict` is the exception that holds no state at all: the request travels in the message
(`PredictMessage`) and the answer comes back on the Redis list that the message names (`PredictReply`).

It does NOT know what a task does, nor whether a job still waits for one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from enum import StrEnum
from typing import Any, Literal, NotRequired, TypedDict
from urllib.parse import parse_qs, urlsplit

from celery import Celery
from kombu.exceptions import OperationalError

log = logging.getLogger(__name__)

Purpose = Literal["prepare", "train"]

#: How long a list of answers outlives its last answer when the API process that reads it is gone.
REPLY_SECONDS = 60
#: How long a cancelled request is known as such; no message waits longer.
CANCELLED_SECONDS = 600


def cancelled_key(request_id: str) -> str:
    """The Redis key that is there when nobody waits for this request any more."""
    return f"heft:cancelled:{request_id}"


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


class PredictModel(TypedDict):
    """Which weights answer: a `base` model by its id, or a `final` or `checkpoint` bundle by its key in
    storage. `owner` is who asks: what a worker keeps of one owner's prompts serves no other."""

    id: str
    owner: str
    kind: Literal["base", "final", "checkpoint"]
    base_model: str
    storage_key: str | None  #: None for a base model
    manifest: dict[str, str] | None  #: {file: sha256}


class Intervention(TypedDict):
    enabled: bool
    scale: float


class PredictMessage(TypedDict):
    """One request. `inputs` are rows as the user wrote them; `sent_at` and `deadline` are unix time: when it was
    sent, and after which nobody waits."""

    request_id: str
    model: PredictModel
    inputs: list[dict[str, Any]]
    intervention: Intervention
    sent_at: float
    deadline: float
    reply_to: str


class PredictedRow(TypedDict):
    answer: str
    probability: float | None
    label_probabilities: dict[str, float] | None
    prompt_tokens: int
    completion_tokens: int


class PredictedRows(TypedDict):
    data: list[PredictedRow]


class PredictFault(TypedDict):
    """An answer that is a refusal: the HTTP status and the error object that the API shall give."""

    status: int
    code: str
    message: str
    param: str | None


class PredictReply(TypedDict):
    """Pushed as JSON to `reply_to` (RPUSH; read it with BLPOP). Exactly one of `ok` and `error` is there."""

    request_id: str
    ok: NotRequired[PredictedRows]
    error: NotRequired[PredictFault]


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


class Hints:
    """Sends hints from one daemon thread. `send` returns at once and never raises, whatever the broker does.

    After a failed publish the breaker is open for `pause_seconds`: hints are dropped instead of piling up,
    and the reconciler sends what was missed.
    """

    def __init__(self, app: Celery, *, capacity: int = 10_000, pause_seconds: float = 5.0) -> None:
        self._app = app
        self._pause = pause_seconds
        self._open_until = 0.0
        self._waiting: queue.Queue[tuple[Task, tuple[str, ...]] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._publish_all, name="hints", daemon=True)
        self._thread.start()

    @property
    def broker_is_away(self) -> bool:
        """Whether the last publish failed less than `pause_seconds` ago."""
        return time.monotonic() < self._open_until

    def hint(self, job_id: str, purpose: Purpose) -> None:
        """Tell the workers that this job waits to be prepared or trained. Call it after the commit."""
        self.send(Task(f"heft.{purpose}"), job_id)

    def export(self, model_id: str, export_format: str) -> None:
        """Tell the workers that this archive is wanted. Call it after the commit."""
        self.send(Task.EXPORT, model_id, export_format)

    def send(self, task: Task, *args: str) -> None:
        if self.broker_is_away:
            return
        try:
            self._waiting.put_nowait((task, args))
        except queue.Full:
            log.warning("hint dropped, %d wait already: %s %s", self._waiting.maxsize, task, args)

    def close(self, timeout: float = 4.0) -> None:
        """Send what waits, for at most `timeout` seconds."""
        try:
            self._waiting.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _publish_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self.broker_is_away:
                continue
            task, args = item
            try:
                self._app.send_task(task.value, args=list(args), retry=False)
            except (OperationalError, OSError) as fault:
                self._open_until = time.monotonic() + self._pause
                log.warning("broker away, hints pause for %g s: %s", self._pause, fault)
