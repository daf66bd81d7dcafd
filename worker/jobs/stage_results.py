"""What stages ended with, between the owner's earlier jobs and this attempt's engine.

The engine asks by its stages' keys (heft_engine.commands.stage_exchange); what the owner has of them is put into
the attempt's
folder. What comes of a new stage is copied to storage for later jobs. It saves work and nothing else: whatever goes
wrong here is a miss, and the job never waits for it. It does NOT know what keys are made of.
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
    """One attempt's. `folder` is there and empty: where its engine looks."""

    def __init__(self, attempt: Attempt, folder: Path) -> None:
        self._attempt = attempt
        self._folder = folder
        self._artifacts = attempt.context.artifacts

    def bring(self, data: Mapping[str, Any]) -> None:
        """Answer a STAGE_KEYS event."""
        try:
            for row in self._rows(data["keys"]):
                self._fetch(row)
        except (Unavailable, OSError) as fault:
            log.warning("%s reuses nothing (more): %s", self._attempt.claim.job_id, fault)
        except Damaged as fault:
            log.error("a stage's result is damaged and given up: %s", fault)
        finally:
            (self._folder / ANSWERED).touch()

    def keep(self, data: Mapping[str, Any]) -> None:
        """Copy the stage's end that a CHECKPOINT_SAVED event names, if it may be reused. Raises LostFence."""
        if "key" not in data:
            return
        try:
            self._copy(Path(data["path"]), data["key"])
        except (Unavailable, OSError) as fault:
            # What is stored without a row goes with the attempt's leavings.
            log.warning("a stage of %s is not kept for later jobs: %s", self._attempt.claim.job_id, fault)

    def _copy(self, path: Path, key: str) -> None:
        context, claim = self._attempt.context, self._attempt.claim
        sealed: dict[str, str] = json.loads((path / MANIFEST).read_text())
        size = sum((path / name).stat().st_size for name in sealed)
        if size > context.settings.reuse_bytes:
            return
        storage_key = f"{attempt_prefix(claim.job_id, claim.attempt)}/result-{key}"
        manifest = self._artifacts.put_directory(storage_key, path)
        if not sealed.items() <= manifest.items():
            return
        with transaction(context.sessions) as session:
            stage_results.add(
                session,
                claim,
                key=key,
                storage_key=storage_key,
                manifest=manifest,
                size=size,
            )

    def _rows(self, keys: Sequence[str]) -> list[StageResult]:
        with transaction(self._attempt.context.sessions) as session:
            return stage_results.find(session, owner_id=self._attempt.claim.owner_id, keys=keys)

    def _fetch(self, row: StageResult) -> None:
        try:
            self._artifacts.fetch_directory(row.storage_key, self._folder / row.key, row.manifest)
        except Damaged:
            with transaction(self._attempt.context.sessions) as session:
                stage_results.forget(session, storage_key=row.storage_key)
            raise
