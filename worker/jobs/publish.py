"""What an attempt leaves in storage: checkpoints, the bundle, the table of losses. Files first, then the row.

Everything lies under the attempt's own prefix, where no other attempt ever writes; the fenced row in
Postgres is the commit point. It does NOT know trainers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

#: Stages may take seconds and save at the end of each epoch. So many seconds lie between two step
#: checkpoints that are stored, unless a crash may cost less than that.
_LEAST_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A directory in storage: {file: SHA-256} under its key."""

    key: str
    manifest: dict[str, str]


class Publisher:
    """Stores what one attempt makes, and commits its checkpoints."""

    def __init__(self, attempt: Attempt, history: LossHistory) -> None:
        self._attempt = attempt
        self._history = history
        self._artifacts = attempt.context.artifacts
        self._prefix = attempt_prefix(attempt.claim.job_id, attempt.claim.attempt)
        self._saved: set[tuple[int, str]] = set()
        self._least_seconds = min(_LEAST_SECONDS, attempt.context.settings.checkpoint_seconds)
        self._next_step = time.monotonic() + self._least_seconds

    def checkpoint(self, data: Mapping[str, Any]) -> None:
        """Store and commit the checkpoint that a CHECKPOINT_SAVED event names, with the history so far."""
        path, step, kind = Path(data["path"]), data["step"], data["kind"]
        if (step, kind) in self._saved:
            return  # asked to stop right after it had saved: the same once more
        if kind == "step" and time.monotonic() < self._next_step and not self._attempt.is_stopping:
            return
        key = f"{self._prefix}/checkpoint-{step}-{kind}"
        manifest = self._store_checkpoint(key, path)
        if manifest is None:
            # The engine keeps few; a slow storage may come too late for one that newer ones have replaced.
            log.info("checkpoint %s is gone already", path.name)
            self._delete(key)
            return
        task = bundle_task(path / "bundle") if kind == "stage" else None
        removed = self._attempt.write(
            partial(
                leases.record_checkpoint,
                step=step,
                stage=data["stage"],
                stage_index=data["stage_index"],
                kind=kind,
                storage_key=key,
                manifest=manifest,
                metrics=data.get("metrics"),
                task=task,
            )
        )
        self._saved.add((step, kind))
        self._next_step = time.monotonic() + self._least_seconds
        for old in removed:
            self._delete(old)

    def bundle(self, path: Path) -> Stored:
        """Store the finished model."""
        key = f"{self._prefix}/bundle"
        return Stored(key=key, manifest=self._store(key, path))

    def results(self) -> NewFile:
        """Store the table of losses; its row is written with the job's end."""
        key = f"{self._prefix}/results.csv"
        sha256 = self._attempt.retrying(partial(self._store_history, key))
        return NewFile(
            file_id=ids.new_file_id(),
            filename="step_metrics.csv",
            size=(self._attempt.folder / FILE_NAME).stat().st_size,
            sha256=sha256,
            storage_key=key,
        )

    def _store_checkpoint(self, key: str, path: Path) -> dict[str, str] | None:
        """Its files and the history; None if it is not, or no longer, the whole checkpoint that it says it
        is.

        The directory is the engine's: nothing is written there, and it may go at any moment.
        """
        try:
            sealed: dict[str, str] = json.loads((path / MANIFEST).read_text())
            manifest = self._store(key, path)
        except FileNotFoundError:
            return None
        if not sealed.items() <= manifest.items():
            return None
        history_key = f"{key}/{FILE_NAME}"
        return manifest | {FILE_NAME: self._attempt.retrying(partial(self._store_history, history_key))}

    def _store_history(self, key: str) -> str:
        path = self._attempt.folder / FILE_NAME
        self._history.save(path)
        return self._artifacts.put_file(key, path)

    def _store(self, key: str, path: Path) -> dict[str, str]:
        store: Callable[[], dict[str, str]] = partial(self._artifacts.put_directory, key, path)
        return self._attempt.retrying(store)

    def _delete(self, key: str) -> None:
        try:
            self._artifacts.delete(key)
        except Unavailable as fault:
            log.info("left to the sweep: %s: %s", key, fault)


def bundle_task(path: Path) -> dict[str, Any]:
    """What a bundle was trained to answer, as its heft.json says."""
    task: dict[str, Any] = json.loads((path / "heft.json").read_text())["task"]
    return task
