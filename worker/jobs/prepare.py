"""Checking a job's files before it is queued: fetch them, have the engine judge them, keep the report.

The engine runs in a child: it loads tokenizers and reads data sets from the hub, and this process holds no
torch. It does NOT know what a good row is.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from store.db.states import JobState
from store.db.tables import Job
from store.jobs import endings
from worker.context import Context
from worker.jobs.attempt import Attempt, Ending, crash_error, failed, run_attempt
from worker.jobs.fetch_rows import FIELDS, fetch_uploads, store_rows
from worker.jobs.run_file import check_file

_FINAL_CODES = ("CHECKED", "FAILED")


def prepare_job(context: Context, job_id: str) -> Job | None:
    """Check this job's files if it waits for that. Returns the job as it then stands; None if there was
    nothing."""
    job = run_attempt(context, job_id, "prepare", _check)
    if job is not None and job.state == JobState.QUEUED:
        context.hints.hint(job.id, "train")
    return job


def _check(attempt: Attempt) -> Ending:
    spec = attempt.claim.spec
    references = {field: reference for field in FIELDS if (reference := getattr(spec, field))}
    uploaded = fetch_uploads(attempt)
    files = references | {field: str(path) for field, path in uploaded.items()}
    path = attempt.folder / "check.json"
    path.write_text(check_file(spec, files, attempt.folder, attempt.context.settings).model_dump_json())
    command = [*attempt.context.engine_command, "check", "--run-file", str(path), "--die-with-parent"]
    ended = attempt.run_engine(command, lambda event: event["code"] in _FINAL_CODES)

    if ended.final_event is None:
        return attempt.crashed(crash_error(ended.code))
    data = ended.final_event["data"]
    if ended.final_event["code"] == "FAILED":
        return failed(attempt, data["error"])
    report = data["report"]
    for field, reference in references.items():
        report["files"][field]["reference"] = reference
    if data["error"] is not None:
        return partial(endings.finish_failed, error=data["error"], report=report)
    for field, made in data["made"].items():
        report["files"][field]["sha256"] = store_rows(attempt, Path(made))
    return partial(endings.finish_prepared, report=report)
