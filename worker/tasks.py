"""The Celery tasks of each role: names on one side, functions on the other.

A hint whose job is done already stands for the job that has waited longest. There are many such: while all workers
train, the reconciler goes on hinting. The first job after them would otherwise wait until they are dropped, which
Celery does one a second.
They do NOT do anything themselves."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from store import leases
from store.database import transaction
from store.logs import bound
from store.queue import PredictMessage, Task
from store.states import Purpose
from store.tables import Job
from worker.context import Context
from worker.export import build_export
from worker.prepare import prepare_job
from worker.run_job import run_job

Work = Callable[[Context, str], Job | None]


def register_inference(app: Celery, answer: Callable[[PredictMessage], None]) -> None:
    def predict(message: PredictMessage) -> None:
        with bound(request_id=message["request_id"]):
            answer(message)

    app.task(predict, name=Task.PREDICT.value)


def register_training(app: Celery, context: Context) -> None:
    def train(job_id: str) -> None:
        _one_job(context, "train", job_id, run_job)

    app.task(train, name=Task.TRAIN.value)


def register_preparing(app: Celery, context: Context) -> None:
    def prepare(job_id: str) -> None:
        _one_job(context, "prepare", job_id, prepare_job)

    def export(model_id: str, export_format: str) -> None:
        with bound(model_id=model_id):
            build_export(context, model_id, export_format)

    app.task(prepare, name=Task.PREPARE.value)
    app.task(export, name=Task.EXPORT.value)


def _one_job(context: Context, purpose: Purpose, hinted: str, work: Work) -> None:
    with bound(job_id=hinted):
        found = work(context, hinted)
    if found is not None or context.stopping.is_set():
        return
    with transaction(context.sessions) as session:
        other = leases.longest_waiting(session, purpose=purpose)
    if other is not None:
        with bound(job_id=other):
            work(context, other)
