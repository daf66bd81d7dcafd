"""Stores what an attempt produces: checkpoints, the bundle, the loss history. Files first, then the row.

Files lie under the attempt's own prefix, where no other attempt writes. The fenced row in Postgres is the commit point.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from store import ids
from store.errors import Unavailable
from store.jobs import leases
from store.storage.artifacts import MANIFEST, attempt_prefix
from store.storage.files import NewFile
from worker.jobs.attempt import Attempt
from worker.jobs.loss_history import FILE_NAME, LossHistory

log = logging.getLogger(__name__)

#: A short stage saves a checkpoint at the end of each epoch. Step checkpoints are stored no more often than this,
#: or than the operator's interval where that is shorter.
_MIN_SECONDS = 30.0


class Publisher:
    """Stores the files of one attempt, and commits its checkpoints."""

    def __init__(self, attempt: Attempt, history: LossHistory) -> None:
        self._attempt = attempt
        self._history = history
        self._artifacts = attempt.context.artifacts
        self._prefix = attempt_prefix(attempt.claim.job_id, attempt.claim.attempt)
        self._committed: set[tuple[int, str]] = set()
        self._min_seconds = min(_MIN_SECONDS, attempt.context.settings.checkpoint_seconds)
        self._next_at = time.monotonic() + self._min_seconds

    def checkpoint(self, data: Mapping[str, Any]) -> None:
        """Stores and commits the checkpoint that a CHECKPOINT_SAVED event describes, with the history so far."""
        path, step, kind = Path(data["path"]), data["step"], data["kind"]
        if (step, kind) in self._committed:
            return  # stopped right after a checkpoint, the engine reports it again
        is_early = time.monotonic() < self._next_at
        if kind == "step" and is_early and self._attempt.stop_reason is None:
            return
        key = f"{self._prefix}/checkpoint-{step}-{kind}"
        manifest = self._store_checkpoint(key, path)
        if manifest is None:
            # The engine keeps the newest few: a slow storage may come too late for this one.
            log.info("checkpoint %s has been replaced by newer ones", path.name)
            self._delete(key)
            return
        old_keys = self._attempt.write(
            partial(
                leases.record_checkpoint,
                step=step,
                stage=data["stage"],
                stage_index=data["stage_index"],
                kind=kind,
                storage_key=key,
                manifest=manifest,
                metrics=data.get("metrics"),
                task=bundle_task(path / "bundle") if kind != "step" else None,
            )
        )
        self._committed.add((step, kind))
        if kind != "epoch":
            # The step checkpoint that comes with an epoch's end is the one that an attempt can continue.
            self._next_at = time.monotonic() + self._min_seconds
        for old_key in old_keys:
            self._delete(old_key)

    def bundle(self, path: Path) -> tuple[str, dict[str, str]]:
        """Stores the trained model. Returns its storage key and its manifest, {file: SHA-256}."""
        key = f"{self._prefix}/bundle"
        return key, self._store(key, path)

    def loss_history(self) -> NewFile:
        """Stores the loss history as the job's result file, whose row is written with the job's end."""
        key = f"{self._prefix}/results.csv"
        sha256 = self._store_history(key)
        return NewFile(
            file_id=ids.new_file_id(),
            filename="step_metrics.csv",
            size=(self._attempt.folder / FILE_NAME).stat().st_size,
            sha256=sha256,
            storage_key=key,
        )

    def _store_checkpoint(self, key: str, path: Path) -> dict[str, str] | None:
        """Stores a checkpoint's files and the history; returns None if the checkpoint is not complete any more.

        The directory belongs to the engine, which may delete it at any moment.
        """
        try:
            sealed: dict[str, str] = json.loads((path / MANIFEST).read_text())
            manifest = self._store(key, path)
        except FileNotFoundError:
            return None
        if not sealed.items() <= manifest.items():
            return None
        return manifest | {FILE_NAME: self._store_history(f"{key}/{FILE_NAME}")}

    def _store_history(self, key: str) -> str:
        path = self._attempt.folder / FILE_NAME

        def store() -> str:
            self._history.save(path)
            return self._artifacts.put_file(key, path)

        return self._attempt.retry_storage(store)

    def _store(self, key: str, path: Path) -> dict[str, str]:
        store: Callable[[], dict[str, str]] = partial(self._artifacts.put_directory, key, path)
        return self._attempt.retry_storage(store)

    def _delete(self, key: str) -> None:
        try:
            self._artifacts.delete(key)
        except Unavailable as error:
            log.info("left to the garbage collection: %s: %s", key, error)


def bundle_task(path: Path) -> dict[str, Any]:
    """Returns the task of a bundle, from its heft.json."""
    task: dict[str, Any] = json.loads((path / "heft.json").read_text())["task"]
    return task
