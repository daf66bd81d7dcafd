"""Passes results of stages between the owner's earlier jobs and this attempt's engine.

The engine asks for the keys of its stages (heft_engine.commands.stage_exchange); stored results of these keys are
fetched into the attempt's folder. The end of each new stage is stored for later jobs. An error here is a cache miss:
it never fails or delays the job.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heft_engine.commands.stage_exchange import ANSWERED
from store.db.session import transaction
from store.db.tables import StageResult
from store.errors import Damaged, Unavailable
from store.jobs import stage_results
from store.storage.artifacts import MANIFEST, attempt_prefix
from worker.jobs.attempt import Attempt

log = logging.getLogger(__name__)


class StageResults:
    """The stage results of one attempt. `folder` exists, empty, and the engine reads it."""

    def __init__(self, attempt: Attempt, folder: Path) -> None:
        self._attempt = attempt
        self._folder = folder
        self._artifacts = attempt.context.artifacts

    def fetch(self, data: Mapping[str, Any]) -> None:
        """Answers a STAGE_KEYS event with the stored results of the first of its stages."""
        try:
            for row in self._rows(data["keys"]):
                self._fetch(row)
        except (Unavailable, OSError) as error:
            log.warning("%s reuses no further stages: %s", self._attempt.claim.job_id, error)
        except Damaged as damage:
            log.error("a stage result is damaged and will be deleted: %s", damage)
        finally:
            (self._folder / ANSWERED).touch()

    def store(self, data: Mapping[str, Any]) -> None:
        """Stores the end of a stage that a CHECKPOINT_SAVED event describes, if it has a key. Raises LostFence."""
        if "key" not in data:
            return
        try:
            self._store(Path(data["path"]), data["key"])
        except (Unavailable, OSError) as error:
            # Files without a row are deleted with the attempt's other files.
            log.warning("a stage of %s is not stored for later jobs: %s", self._attempt.claim.job_id, error)

    def _store(self, path: Path, key: str) -> None:
        context, claim = self._attempt.context, self._attempt.claim
        sealed: dict[str, str] = json.loads((path / MANIFEST).read_text())
        size = sum((path / name).stat().st_size for name in sealed)
        if size > context.settings.reuse_bytes:
            return
        storage_key = f"{attempt_prefix(claim.job_id, claim.attempt)}/result-{key}"
        manifest = self._artifacts.put_directory(storage_key, path)
        if not sealed.items() <= manifest.items():
            return  # changed or removed meanwhile
        with transaction(context.sessions) as session:
            stage_results.add(session, claim, key=key, storage_key=storage_key, manifest=manifest, size=size)

    def _rows(self, keys: Sequence[str]) -> list[StageResult]:
        with transaction(self._attempt.context.sessions) as session:
            return stage_results.find(session, owner_id=self._attempt.claim.owner_id, keys=keys)

    def _fetch(self, row: StageResult) -> None:
        try:
            self._artifacts.fetch_directory(row.storage_key, self._folder / row.key, row.manifest)
        except Damaged:
            with transaction(self._attempt.context.sessions) as session:
                stage_results.remove(session, storage_key=row.storage_key)
            raise
