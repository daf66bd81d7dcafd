"""The models of an inference worker: loaded from storage, evicted under a memory budget, counted."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import torch
import transformers

from heft_engine.config.metric_names import TaskType
from heft_engine.errors import ModelError
from heft_engine.runtime import malloc
from heft_engine.runtime.devices import reserved_share
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.model_pool import ModelPool
from heft_engine.serving.predictor import Predictor
from store import models
from store.db.session import transaction
from store.errors import Damaged
from store.messages.predict import PredictModel
from worker.context import Context
from worker.inference.metrics import InferenceMetrics

#: A worker that has been idle for so long returns freed memory to the system.
_IDLE_SECONDS = 20.0


class Models:
    """Safe to use from many threads. Requests that come at the same time share forward passes."""

    def __init__(self, context: Context, metrics: InferenceMetrics) -> None:
        settings = context.settings
        transformers.utils.logging.disable_progress_bar()  # the log is no terminal
        self._metrics = metrics
        self._sessions = context.sessions
        self._artifacts = context.artifacts
        self._scratch = context.scratch
        self._batcher = Batcher(prefix_bytes=settings.prefix_cache_bytes, observer=metrics)
        self.pool = ModelPool(
            budget_bytes=settings.memory_budget_bytes or _three_quarters_of_memory(),
            batcher=self._batcher,
            placement=settings.hold_models,
            model_dir=settings.model_dir,
            cache_dir=settings.cache_dir,
            allow_paths=False,
            key_value_bytes=settings.generate_memory_bytes,
            on_evict=self._on_evict,
        )
        self._trimmed_at = time.monotonic()
        self._has_evicted = False

    def close(self) -> None:
        self.pool.close()

    def leave_free(self, claimed_bytes: int) -> None:
        """Keeps models to what trainers leave of the GPU: idle ones beyond that are evicted. 0: nothing is claimed."""
        limit_bytes = math.inf
        if claimed_bytes > 0:
            total = torch.cuda.get_device_properties(0).total_memory
            limit_bytes = max(0, total - reserved_share(total) - claimed_bytes)
        self.pool.limit(limit_bytes)

    def use(
        self, model: PredictModel, base_task: TaskType | None = None
    ) -> AbstractContextManager[Predictor]:
        """Gives a model, loaded if need be; it is not evicted meanwhile.

        A base model answers questions of `base_task`. Raises BundleError, ModelError, Damaged or Unavailable.
        """
        if model["kind"] != "base":
            return self.pool.model(model["id"], lambda: self._fetch(model))
        return self.pool.base(model["base_model"], base_task or "yes_no")

    def evict_deleted(self) -> None:
        """Evicts models that their owners have deleted. Raises Unavailable, on which loaded models go on answering."""
        model_ids = self.pool.names
        if not model_ids:
            return
        with transaction(self._sessions) as session:
            existing = models.present(session, model_ids=model_ids)
        for model_id in model_ids:
            if model_id not in existing:
                self.pool.remove(model_id)

    def record_usage(self) -> None:
        """Updates the metrics of loaded models."""
        for kind, (count, size) in self.pool.usage().items():
            self._metrics.on_usage(kind, count, size)

    def trim_memory(self) -> None:
        """Returns freed memory to the system after evictions and once the worker is idle.

        Not more often: the next passes have to allocate theirs anew.
        """
        last_active_at = self._batcher.last_active_at
        is_idle = self._trimmed_at < last_active_at < time.monotonic() - _IDLE_SECONDS
        if self._has_evicted or is_idle:
            self._trimmed_at, self._has_evicted = time.monotonic(), False
            malloc.trim()

    def _on_evict(self) -> None:
        """Returns GPU memory to other processes at once; the machine's is returned by `trim_memory`."""
        self._has_evicted = True
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _fetch(self, model: PredictModel) -> Iterator[Path]:
        """Downloads a model's bundle for as long as it is read."""
        folder = Path(tempfile.mkdtemp(prefix="bundle-", dir=self._scratch))
        try:
            path = folder / "bundle"
            try:
                self._artifacts.fetch_directory(model["storage_key"] or "", path, model["manifest"] or {})
            except Damaged as damage:
                self._check_present(model["id"], damage)
                raise
            yield path
        finally:
            shutil.rmtree(folder)

    def _check_present(self, model_id: str, damage: Damaged) -> None:
        """Raises ModelError for a model that was deleted after its request had been accepted: its bytes may be gone."""
        with transaction(self._sessions) as session:
            if model_id not in models.present(session, model_ids=[model_id]):
                raise ModelError(f"there is no model {model_id!r} any more") from damage


def _three_quarters_of_memory() -> int:
    """Returns bytes: of the GPU's memory if there is a GPU, else of the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * 3 // 4)
    return int(psutil.virtual_memory().total * 3 // 4)
