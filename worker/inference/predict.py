"""The inference side: a question comes in with the address of a model, an answer goes out.

It does NOT know owners, jobs or the database: the API has checked what may be asked, and the message says it
all.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import transformers
from redis import Redis
from redis.exceptions import RedisError

from heft_engine.config.metric_names import TaskType
from heft_engine.data.rows import Row, infer_task, parse_row
from heft_engine.errors import EngineError, ModelError, RowError
from heft_engine.runtime import malloc
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.model_pool import ModelPool
from heft_engine.serving.predictor import Predictor
from store.errors import StoreError, Unavailable
from store.messages.broker import redis_py_url
from store.messages.predict import (
    REPLY_SECONDS,
    PredictedRow,
    PredictedRows,
    PredictFault,
    PredictMessage,
    PredictModel,
    PredictReply,
)
from worker.context import Context
from worker.inference.cancellations import Cancelled
from worker.inference.metrics import InferenceMetrics

log = logging.getLogger(__name__)

_REPLY_TIMEOUT_SECONDS = 3.0
#: A worker that has computed nothing for so long keeps no freed memory.
_REST_SECONDS = 20.0


class RequestAbandoned(Exception):
    """The request's time is over, or its client has gone."""


class Inference:
    """Answers requests, each from whatever thread it comes on; those that come together share forward passes."""

    def __init__(self, context: Context, metrics: InferenceMetrics) -> None:
        self._metrics = metrics
        settings = context.settings
        transformers.utils.logging.disable_progress_bar()  # the log is no terminal
        self._artifacts = context.artifacts
        self._scratch = context.scratch
        self.redis = Redis.from_url(
            redis_py_url(settings.redis_url),
            socket_timeout=_REPLY_TIMEOUT_SECONDS,
            socket_connect_timeout=_REPLY_TIMEOUT_SECONDS,
        )
        self.cancelled = Cancelled(self.redis)
        self.batcher = Batcher(prefix_bytes=settings.prefix_cache_bytes, observer=metrics)
        self.pool = ModelPool(
            budget_bytes=settings.memory_budget_bytes or three_quarters_of_memory(),
            batcher=self.batcher,
            placement=settings.hold_models,
            model_dir=settings.model_dir,
            cache_dir=settings.cache_dir,
            allow_paths=False,
            key_value_bytes=settings.generate_memory_bytes,
            out_of_memory=(MemoryError, torch.OutOfMemoryError),
            on_evict=self._some_left,
        )
        self._gave_back_at = time.monotonic()
        self._have_left = False

    def close(self) -> None:
        self.pool.close()
        self.redis.close()

    def holding(self, model: PredictModel, task: TaskType | None) -> AbstractContextManager[Predictor]:
        """The model in memory, for as long as it is asked. `task`: how a base model is asked.

        Raises BundleError, ModelError, Damaged or Unavailable.
        """
        if model["kind"] != "base":
            return self.pool.model(model["id"], lambda: self._fetched(model))
        return self.pool.base(model["base_model"], task or "yes_no")

    @contextmanager
    def _fetched(self, model: PredictModel) -> Iterator[Path]:
        """A model's bundle from storage, for as long as it is read."""
        folder = Path(tempfile.mkdtemp(prefix="bundle-", dir=self._scratch))
        try:
            path = folder / "bundle"
            self._artifacts.fetch_directory(model["storage_key"] or "", path, model["manifest"] or {})
            yield path
        finally:
            shutil.rmtree(folder)

    def answer(self, message: PredictMessage) -> None:
        """Answer, or say why not; a request that nobody waits for any more is dropped."""
        with self.cancelled.waiting(message["request_id"], sent_at=message["sent_at"]):
            began = time.perf_counter()
            self._answer(message)
            self._metrics.answered(time.perf_counter() - began)

    def give_memory_back(self) -> None:
        """What models have left, and what passes have freed and nobody has wanted for a while, goes to the system.

        Not more often than it is asked for: the next passes have to get theirs anew.
        """
        worked_at = self.batcher.last_active_at
        rests = self._gave_back_at < worked_at < time.monotonic() - _REST_SECONDS
        if self._have_left or rests:
            self._gave_back_at, self._have_left = time.monotonic(), False
            malloc.trim()

    def _some_left(self) -> None:
        """To the other processes on the GPU at once; the machine's memory waits for `give_memory_back`."""
        self._have_left = True
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def count_models(self) -> None:
        """Tell the metrics what is in memory."""
        for kind, (count, size) in self.pool.usage().items():
            self._metrics.held(kind, count, size)

    def fine_tuned(self) -> list[str]:
        """The ids of the fine-tuned models in memory."""
        return self.pool.names

    def forget(self, model_id: str) -> None:
        """Put a model away, after the answers that are under way."""
        self.pool.remove(model_id)

    def _answer(self, message: PredictMessage) -> None:
        request_id = message["request_id"]
        try:
            ok = PredictedRows(data=self._predict(message))
            _check_numbers(ok)
        except RequestAbandoned:
            self._metrics.dropped()
            log.info("nobody waits for %s any more", request_id)
        except (EngineError, StoreError) as fault:
            self._reply(message, PredictReply(request_id=request_id, error=fault_of(fault)))
        except Exception:
            error = PredictFault(status=500, code="internal_error", message="the worker failed", param=None)
            self._reply(message, PredictReply(request_id=request_id, error=error))
            raise
        else:
            self._reply(message, PredictReply(request_id=request_id, ok=ok))

    def _predict(self, message: PredictMessage) -> list[PredictedRow]:
        self._check_active(message)
        model, intervention = message["model"], message["intervention"]
        task = infer_task(parse_inputs(message["inputs"], None)) if model["kind"] == "base" else None
        with self.holding(model, task) as predictor:
            self._check_active(message)
            self._metrics.queued(time.time() - message["sent_at"])
            labels = predictor.task.labels if predictor.task.type == "choice" else None
            rows = parse_inputs(message["inputs"], labels)
            try:
                answers = predictor.predict(
                    rows,
                    enabled=intervention["enabled"],
                    scale=intervention["scale"],
                    owner=model["owner"],
                    is_active=lambda: self._is_active(message),
                )
            except CancelledError as left:
                raise RequestAbandoned from left
        return [cast(PredictedRow, asdict(answer)) for answer in answers]

    def _is_active(self, message: PredictMessage) -> bool:
        return is_active(self.cancelled, message["request_id"], message["deadline"])

    def _check_active(self, message: PredictMessage) -> None:
        """Raises RequestAbandoned."""
        check_active(self.cancelled, message["request_id"], message["deadline"])

    def _reply(self, message: PredictMessage, reply: PredictReply) -> None:
        payload = json.dumps(reply, allow_nan=False)
        try:
            with self.redis.pipeline() as pipe:
                pipe.rpush(message["reply_to"], payload)
                pipe.expire(message["reply_to"], REPLY_SECONDS)
                pipe.execute()
        except RedisError as fault:
            log.warning("no answer to %s: the broker is away: %s", message["request_id"], fault)


def is_active(cancelled: Cancelled, request_id: str, deadline: float) -> bool:
    """Whether its time is not over and its client still there."""
    return time.time() <= deadline and not cancelled.is_cancelled(request_id)


def check_active(cancelled: Cancelled, request_id: str, deadline: float) -> None:
    """Raises RequestAbandoned."""
    if not is_active(cancelled, request_id, deadline):
        raise RequestAbandoned


def parse_inputs(inputs: Sequence[dict[str, Any]], labels: Sequence[str] | None) -> list[Row]:
    """The questions as rows. Raises RowError whose `param` names the input, if there are several, and its
    field."""
    rows = []
    for index, given in enumerate(inputs):
        try:
            rows.append(parse_row(given, labels=labels, need_answer=False))
        except RowError as fault:
            if len(inputs) == 1:
                raise
            param = f"inputs[{index}].{fault.param}" if fault.param else f"inputs[{index}]"
            raise RowError(f"input {index}: {fault.message}", param=param) from fault
    return rows


def fault_of(fault: EngineError | StoreError) -> PredictFault:
    """How a fault is answered: the caller's own as 4xx, ours as 5xx."""
    if isinstance(fault, RowError):
        return PredictFault(status=422, code="invalid_value", message=fault.message, param=fault.param)
    if isinstance(fault, ModelError):
        return PredictFault(status=404, code=fault.code, message=fault.message, param="model")
    status = 503 if isinstance(fault, Unavailable) else 500
    return PredictFault(status=status, code=fault.code or "internal_error", message=fault.message, param=None)


def three_quarters_of_memory() -> int:
    """Bytes: of the GPU's memory if there is one, else of the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * 3 // 4)
    return int(psutil.virtual_memory().total * 3 // 4)


def _check_numbers(rows: PredictedRows) -> None:
    """Raises ValueError for a score that is no number: it has no place in JSON, and the caller waits."""
    json.dumps(rows, allow_nan=False)
