"""The task behind `/predict`: rows in, predictions out. The API has checked that the caller may use the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict
from typing import Any, cast

from heft_engine.data.rows import Row, infer_task, parse_row
from heft_engine.errors import RowError
from store.messages.predict import PredictedRow, PredictedRows, PredictMessage, PredictReply
from worker.inference.metrics import InferenceMetrics
from worker.inference.models import Models
from worker.inference.requests import ActiveRequest, RequestAbandoned, Requests


class PredictHandler:
    """Safe to call from many threads."""

    def __init__(self, models: Models, requests: Requests, metrics: InferenceMetrics) -> None:
        self._models = models
        self._requests = requests
        self._metrics = metrics

    def handle(self, message: PredictMessage) -> None:
        """Answers a request, with predictions or with the error that prevents them."""
        started = time.perf_counter()
        if not self._requests.answer(message, lambda request: self._answer(message, request)):
            self._metrics.on_abandoned()
        self._metrics.on_answered(time.perf_counter() - started)

    def _answer(self, message: PredictMessage, request: ActiveRequest) -> None:
        model, intervention = message["model"], message["intervention"]
        rows = base_task = None
        if model["kind"] == "base":
            rows = parse_inputs(message["inputs"], None)
            base_task = infer_task(rows)
        with self._models.use(model, base_task) as predictor:
            request.check_active()
            self._metrics.on_started(time.time() - message["sent_at"])
            if rows is None:
                rows = parse_inputs(message["inputs"], predictor.task.row_labels)
            try:
                predictions = predictor.predict(
                    rows,
                    enabled=intervention["enabled"],
                    scale=intervention["scale"],
                    owner=model["owner"],
                    is_active=request.is_active,
                )
            except CancelledError as error:
                raise RequestAbandoned from error
        predicted = cast(list[PredictedRow], list(map(asdict, predictions)))
        request.reply(PredictReply(request_id=message["request_id"], ok=PredictedRows(data=predicted)))


def parse_inputs(inputs: Sequence[dict[str, Any]], labels: Sequence[str] | None) -> list[Row]:
    """Parses questions. Raises RowError, whose `param` names the input where there are several, and its field."""
    rows = []
    for index, fields in enumerate(inputs):
        try:
            rows.append(parse_row(fields, labels=labels, need_answer=False))
        except RowError as error:
            if len(inputs) == 1:
                raise
            param = f"inputs[{index}].{error.param}" if error.param else f"inputs[{index}]"
            raise RowError(f"input {index}: {error.message}", param=param) from error
    return rows
