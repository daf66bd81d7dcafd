"""Training one job: fetch its files and its last checkpoint, run the engine, store what it leaves.

Read from top to bottom it is the way of one attempt. It does NOT know leases, signals or retries: `attempt`
does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from heft_engine.config.run_file import FileField, RunFile
from store.db.tables import Job
from store.errors import Damaged
from store.jobs import endings, leases
from store.studies import studies
from worker.chores.activation_folder import activation_folder
from worker.chores.gpu_handoff import gpu_requested
from worker.context import Context
from worker.jobs.attempt import Attempt, Ending, crash_error, failed, run_attempt
from worker.jobs.event_recorder import EventRecorder
from worker.jobs.fetch_rows import fetch_rows
from worker.jobs.loss_history import FILE_NAME, LossHistory
from worker.jobs.publish import Publisher, bundle_task
from worker.jobs.run_file import CHECKPOINTS, STAGES, reuses, run_file, train_config
from worker.jobs.stage_results import StageResults

log = logging.getLogger(__name__)


def train_job(context: Context, job_id: str) -> Job | None:
    """Train this job if it waits for it. Returns the job as it then stands; None if there was nothing to
    do."""
    return run_attempt(context, job_id, "train", _train)


def _train(attempt: Attempt) -> Ending:
    rows = fetch_rows(attempt)
    resume = _fetch_checkpoint(attempt)
    run = _run_file(attempt, rows, resume)
    history = LossHistory.load(resume / FILE_NAME) if resume else LossHistory()
    publisher = Publisher(attempt, history)
    stage_dir = attempt.folder / STAGES
    results = StageResults(attempt, stage_dir)

    def save_checkpoint(data: Mapping[str, Any]) -> None:
        publisher.checkpoint(data)
        results.keep(data)
        if data["kind"] == "stage":
            attempt.write(partial(leases.record_stage_passed, stages=data["stage_index"] + 1))

    reporter = EventRecorder(
        attempt, history, save_checkpoint=save_checkpoint, fetch_stage_results=results.bring
    )

    attempt.raise_if_stopping()
    (attempt.folder / CHECKPOINTS).mkdir()
    stage_dir.mkdir()
    path = attempt.folder / "run.json"
    path.write_text(run.model_dump_json())
    command = [*attempt.context.engine_command, "train", "--run-file", str(path), "--die-with-parent"]
    with gpu_requested(attempt.context, f"{attempt.claim.job_id}/{attempt.claim.attempt}"):
        ended = attempt.run_engine(command, reporter.hear)

    if ended.final_event is None:
        return attempt.crashed(crash_error(ended.code))
    if ended.final_event["code"] == "FAILED":
        return failed(attempt, ended.final_event["data"]["error"])
    return _succeeded(run.out, publisher, ended.final_event["data"])


def _run_file(attempt: Attempt, rows: Mapping[FileField, Path], resume: Path | None) -> RunFile:
    spec, settings = attempt.claim.spec, attempt.context.settings
    is_trial = attempt.write(lambda session, claim: studies.is_trial(session, claim.job_id))
    return run_file(
        train_config(spec, revision=_revision(attempt)),
        attempt.folder,
        rows,
        settings,
        resume=resume,
        activation_dir=activation_folder(attempt.context) if reuses(spec, settings) else None,
        owner=attempt.claim.owner_id,
        evaluate_validation=is_trial,
    )


def _succeeded(bundle_path: Path, publisher: Publisher, data: Mapping[str, Any]) -> Ending:
    bundle = publisher.bundle(bundle_path)
    return partial(
        endings.finish_succeeded,
        storage_key=bundle.key,
        manifest=bundle.manifest,
        task=bundle_task(bundle_path),
        evaluation=data["evaluation"],
        parity=data["parity"],
        trained_tokens=data["trained_tokens"],
        result_file=publisher.results(),
        outcomes=data.get("outcomes"),
        costs=data.get("costs", ()),
    )


def _fetch_checkpoint(attempt: Attempt) -> Path | None:
    """The best checkpoint that is whole; None to begin at the beginning."""
    for checkpoint in attempt.claim.checkpoints:
        attempt.raise_if_stopping()
        path = attempt.folder / f"resume-{checkpoint.step}"
        fetch = partial(
            attempt.context.artifacts.fetch_directory, checkpoint.storage_key, path, checkpoint.manifest
        )
        try:
            attempt.retrying(fetch)
        except Damaged as fault:
            log.error("checkpoint %s of %s is damaged: %s", checkpoint.id, attempt.claim.job_id, fault)
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


def _revision(attempt: Attempt) -> str | None:
    base = (attempt.claim.validation or {}).get("base_model") or {}
    return base.get("revision") if base.get("source") == "hub" else None
