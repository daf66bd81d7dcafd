"""Trains one job: fetch its rows and its last checkpoint, run the engine, store the results.

`_train` is one attempt from top to bottom; `worker.jobs.attempt` has the lease, the retries and the ways in which it
is stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from heft_engine.config.run_file import FileField, RunFile
from store.db.tables import Job
from store.errors import Damaged
from store.jobs import endings, leases
from store.studies import studies
from worker.chores.gpu_handoff import gpu_requested
from worker.context import Context
from worker.jobs.attempt import Attempt, Ending, Event, run_attempt
from worker.jobs.event_recorder import EventRecorder
from worker.jobs.fetch_rows import fetch_rows
from worker.jobs.group import GivesWay, gathered, join_group
from worker.jobs.loss_history import FILE_NAME, LossHistory
from worker.jobs.publish import Publisher, bundle_task
from worker.jobs.run_file import CHECKPOINTS, STAGES, Node, hub_revision, reuses, run_file, train_config
from worker.jobs.stage_results import StageResults
from worker.jobs.start_model import fetch_start
from worker.jobs.trackers import trackers_of

log = logging.getLogger(__name__)


def train_job(context: Context, job_id: str) -> Job | None:
    """Trains this job if it is queued. Returns the job afterwards; None if it is not queued.

    Of workers that train together, one that a group waits for joins that group instead.
    """
    is_grouped = context.settings.train_nodes > 1 and not context.stopping.is_set()
    if is_grouped and join_group(context):
        return None
    return run_attempt(context, job_id, "train", _train)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Files that were fetched for an attempt. checkpoint: None to train from the start."""

    rows: Mapping[FileField, Path]
    start: Path | None  #: the bundle of the fine-tuned model that the job goes on from
    checkpoint: Path | None


def _train(attempt: Attempt) -> Ending:
    files = _Files(
        rows=fetch_rows(attempt), start=fetch_start(attempt), checkpoint=_fetch_checkpoint(attempt)
    )
    try:
        with gathered(attempt) as node:
            return _train_on(attempt, files, node)
    except GivesWay:
        return partial(
            endings.release, reason="Its worker joins a job that waited longer for several workers."
        )


def _train_on(attempt: Attempt, files: _Files, node: Node | None) -> Ending:
    """Trains from a checkpoint, if there is one, and stores the result. node: this machine, of several."""
    run = _run_file(attempt, files, node)
    checkpoint = files.checkpoint
    history = LossHistory.load(checkpoint / FILE_NAME) if checkpoint else LossHistory()
    publisher = Publisher(attempt, history)
    stage_dir = attempt.folder / STAGES
    stage_results = StageResults(attempt, stage_dir)

    def save_checkpoint(data: Mapping[str, Any]) -> None:
        publisher.checkpoint(data)
        stage_results.store(data)
        if data["kind"] == "stage":
            attempt.write(partial(leases.record_stage_passed, stages=data["stage_index"] + 1))

    recorder = EventRecorder(
        attempt, history, save_checkpoint=save_checkpoint, fetch_stage_results=stage_results.fetch
    )

    def handle(event: Event) -> None:
        if event["code"] == "STAGE_STARTED":
            gpu.claim(event["data"]["memory_bytes"])
        recorder.handle(event)
        trackers.handle(event)

    attempt.raise_if_stopping()
    (attempt.folder / CHECKPOINTS).mkdir()
    stage_dir.mkdir()
    request = f"{attempt.claim.job_id}/{attempt.claim.attempt}"
    with trackers_of(attempt) as trackers, gpu_requested(attempt.context, request) as gpu:
        result = attempt.run_engine("train", run, final_code="SUCCEEDED", handle=handle, node=node)

    storage_key, manifest = publisher.bundle(run.out)
    return partial(
        endings.finish_succeeded,
        storage_key=storage_key,
        manifest=manifest,
        task=bundle_task(run.out),
        result=result,
        result_file=publisher.loss_history(),
    )


def _run_file(attempt: Attempt, files: _Files, node: Node | None) -> RunFile:
    spec, settings = attempt.claim.spec, attempt.context.settings
    is_trial = attempt.write(lambda session, claim: studies.is_trial(session, claim.job_id))
    return run_file(
        train_config(spec, revision=hub_revision(attempt.claim.validation)),
        attempt.folder,
        files.rows,
        settings,
        start=files.start,
        resume=files.checkpoint,
        activation_dir=attempt.context.activation_folder if reuses(spec, settings) else None,
        owner=attempt.claim.owner_id,
        evaluate_validation=is_trial,
        n_checkpoints=spec.n_checkpoints,
        node=node,
    )


def _fetch_checkpoint(attempt: Attempt) -> Path | None:
    """Returns the path of the latest checkpoint that is undamaged; None to train from the start."""
    artifacts = attempt.context.artifacts
    for checkpoint in attempt.claim.checkpoints:
        attempt.raise_if_stopping()
        path = attempt.folder / f"resume-{checkpoint.step}"
        fetch = partial(artifacts.fetch_directory, checkpoint.storage_key, path, checkpoint.manifest)
        try:
            attempt.retry_storage(fetch)
        except Damaged as damage:
            log.error("checkpoint %s of %s is damaged: %s", checkpoint.id, attempt.claim.job_id, damage)
            attempt.write(
                partial(
                    leases.record_event,
                    code="WARNING",
                    message=f"The checkpoint at step {checkpoint.step} is damaged; an earlier one is used.",
                    data={"signature": "damaged_checkpoint", "checkpoint": checkpoint.id},
                    level="warn",
                )
            )
        else:
            return path
    return None
