"""Validates a job's files before it is queued: fetch them, let the engine check them, store the report.

The engine runs in a child process: it loads tokenizers and reads datasets from the hub, and this process has no torch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Job
from store.jobs import dry_run, endings
from store.jobs.spec import TrainingSpec
from store.ops import workers
from worker.context import Context
from worker.jobs.attempt import Attempt, Ending, run_attempt
from worker.jobs.fetch_rows import fetch_uploads, store_rows
from worker.jobs.run_file import check_file
from worker.jobs.start_model import fetch_start


def prepare_job(context: Context, job_id: str) -> Job | None:
    """Validates this job's files if it waits for that. Returns the job afterwards; None if it does not wait."""
    job = run_attempt(context, job_id, "prepare", _check)
    if job is not None and job.state == JobState.QUEUED:
        context.hints.hint(job.id, "train")
    return job


def _check(attempt: Attempt) -> Ending:
    spec = attempt.claim.spec
    references = spec.files()
    uploads = fetch_uploads(attempt)
    files = references | {field: str(path) for field, path in uploads.items()}
    start = fetch_start(attempt)
    machine = _training_machine(attempt.context) if spec.dry_run else None
    run = check_file(spec, files, attempt.folder, attempt.context.settings, start=start, machine=machine)
    result = attempt.run_engine("check", run, final_code="CHECKED", handle=lambda _: None)

    report = result["report"]
    for field, reference in references.items():
        report["files"][field]["reference"] = reference
    if result["error"] is not None:
        return partial(endings.finish_failed, error=result["error"], report=report)
    if spec.dry_run:
        return _dry_run(attempt.context, spec, report, result["plan"], machine)
    for field, path in result["made"].items():
        report["files"][field]["sha256"] = store_rows(attempt, Path(path))
    return partial(endings.finish_prepared, report=report)


def _training_machine(context: Context) -> dict[str, Any] | None:
    with transaction(context.sessions) as session:
        return workers.training_machine(session)


def _dry_run(
    context: Context,
    spec: TrainingSpec,
    report: dict[str, Any],
    plan: list[dict[str, Any]] | None,
    machine: dict[str, Any] | None,
) -> Ending:
    with transaction(context.sessions) as session:
        estimate = dry_run.estimate(session, spec, report, plan, machine)
    return partial(endings.finish_dry_run, report=report, estimate=estimate)
