"""Copies the fine-tuned model that a job goes on from to this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from store import models
from worker.jobs.attempt import Attempt


def fetch_start(attempt: Attempt) -> Path | None:
    """Returns the path of the bundle; None for a job that starts from a base. Raises Damaged.

    A model that was deleted meanwhile has its bytes until the job ends.
    """
    spec = attempt.claim.spec
    if not spec.goes_on:
        return None
    attempt.raise_if_stopping()
    model = attempt.write(lambda session, _: models.for_worker(session, model_id=spec.model))
    path = attempt.folder / "start"
    fetch = partial(attempt.context.artifacts.fetch_directory, model.storage_key or "", path, model.manifest)
    attempt.retry_storage(fetch)
    return path
