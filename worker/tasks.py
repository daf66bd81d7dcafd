"""The Celery tasks of each role.

A task for a job or an export that is done already takes the one that has waited longest instead. There are many such
messages: while all workers train, the reconciler goes on sending hints. Without prefetch Celery takes one message a
second, so the next job would otherwise wait until all of them are dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from store import exports
from store.db.session import transaction
from store.db.states import Purpose
from store.db.tables import Job
from store.jobs import leases
from store.logs import bound
from store.messages.broker import Task
from store.messages.generate import GenerateMessage
from store.messages.predict import PredictMessage
from worker.context import Context
from worker.jobs.export import build_export
from worker.jobs.prepare import prepare_job
from worker.jobs.train import train_job

RunJob = Callable[[Context, str], Job | None]


def register_inference(
    app: Celery, predict: Callable[[PredictMessage], None], generate: Callable[[GenerateMessage], None]
) -> None:
    # Without `typing`, which counts a bound method's `self` among the arguments.
    app.task(predict, name=Task.PREDICT.value, typing=False)
    app.task(generate, name=Task.GENERATE.value, typing=False)


def register_training(app: Celery, context: Context) -> None:
    def train(job_id: str) -> None:
        _run_job(context, "train", job_id, train_job)

    app.task(train, name=Task.TRAIN.value)


def register_preparing(app: Celery, context: Context) -> None:
    def prepare(job_id: str) -> None:
        _run_job(context, "prepare", job_id, prepare_job)

    def export(model_id: str, export_format: str) -> None:
        _run_export(context, model_id, export_format)

    app.task(prepare, name=Task.PREPARE.value)
    app.task(export, name=Task.EXPORT.value)


def _run_job(context: Context, purpose: Purpose, job_id: str, run_job: RunJob) -> None:
    with bound(job_id=job_id):
        job = run_job(context, job_id)
    if job is not None or context.stopping.is_set():
        return
    with transaction(context.sessions) as session:
        waiting_id = leases.longest_waiting(session, purpose=purpose)
    if waiting_id is not None:
        with bound(job_id=waiting_id):
            run_job(context, waiting_id)


def _run_export(context: Context, model_id: str, export_format: str) -> None:
    with bound(model_id=model_id):
        was_waiting = build_export(context, model_id, export_format)
    if was_waiting or context.stopping.is_set():
        return
    with transaction(context.sessions) as session:
        longest_waiting = exports.waiting(session, limit=1)
    for waiting_id, waiting_format in longest_waiting:
        with bound(model_id=waiting_id):
            build_export(context, waiting_id, waiting_format)
