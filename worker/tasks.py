"""The Celery tasks of each role: names on one side, functions on the other. They do NOT do anything
themselves."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from store.logs import bound
from store.queue import PredictMessage, Task
from worker.context import Context
from worker.export import build_export
from worker.prepare import prepare_job
from worker.run_job import run_job


def register_inference(app: Celery, answer: Callable[[PredictMessage], None]) -> None:
    def predict(message: PredictMessage) -> None:
        with bound(request_id=message["request_id"]):
            answer(message)

    app.task(predict, name=Task.PREDICT.value)


def register_training(app: Celery, context: Context) -> None:
    def train(job_id: str) -> None:
        with bound(job_id=job_id):
            run_job(context, job_id)

    app.task(train, name=Task.TRAIN.value)


def register_preparing(app: Celery, context: Context) -> None:
    def prepare(job_id: str) -> None:
        with bound(job_id=job_id):
            prepare_job(context, job_id)

    def export(model_id: str, export_format: str) -> None:
        with bound(model_id=model_id):
            build_export(context, model_id, export_format)

    app.task(prepare, name=Task.PREPARE.value)
    app.task(export, name=Task.EXPORT.value)
