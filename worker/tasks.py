"""The Celery tasks of each role: names on one side, functions on the other. They do NOT do the work.

A hint whose job or archive is done already stands for the one that has waited longest. There are many such hints:
while all workers train, the reconciler goes on hinting. The first job behind them would wait until all are dropped,
which Celery does one a second.
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

Work = Callable[[Context, str], Job | None]


def register_inference(
    app: Celery, answer: Callable[[PredictMessage], None], write: Callable[[GenerateMessage], None]
) -> None:
    def predict(message: PredictMessage) -> None:
        with bound(request_id=message["request_id"]):
            answer(message)

    def generate(message: GenerateMessage) -> None:
        with bound(request_id=message["request_id"]):
            write(message)

    app.task(predict, name=Task.PREDICT.value)
    app.task(generate, name=Task.GENERATE.value)


def register_training(app: Celery, context: Context) -> None:
    def train(job_id: str) -> None:
        _one_job(context, "train", job_id, train_job)

    app.task(train, name=Task.TRAIN.value)


def register_preparing(app: Celery, context: Context) -> None:
    def prepare(job_id: str) -> None:
        _one_job(context, "prepare", job_id, prepare_job)

    def export(model_id: str, export_format: str) -> None:
        with bound(model_id=model_id):
            found = build_export(context, model_id, export_format)
        if not found and not context.stopping.is_set():
            _longest_waiting_export(context)

    app.task(prepare, name=Task.PREPARE.value)
    app.task(export, name=Task.EXPORT.value)


def _longest_waiting_export(context: Context) -> None:
    with transaction(context.sessions) as session:
        waiting = exports.waiting(session, limit=1)
    for model_id, export_format in waiting:
        with bound(model_id=model_id):
            build_export(context, model_id, export_format)


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
