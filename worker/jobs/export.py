"""Builds exports: fetch the bundle, let the engine convert it, store one tar file. Diagnostics are one JSON file.

An export has a lease as a job has; one that is lost is built again.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any, cast

from sqlalchemy.orm import Session

from store import exports
from store.db.session import transaction
from store.db.tables import Job
from store.errors import Damaged, LostFence, NotFound, Unavailable
from store.exports import DIAGNOSTICS, ExportClaim
from store.jobs.fence import StopRequest
from store.jobs.spec import TrainingSpec
from store.storage import files
from store.storage.artifacts import Artifacts, export_key, prepared_key
from worker.context import Context
from worker.engine_process.child import Child, child_environment
from worker.engine_process.supervisor import Limits, StopReason, Supervisor
from worker.jobs.attempt import job_error

log = logging.getLogger(__name__)

#: Diagnostics use the first of these files that the job has: rows that it was not trained on tell more.
_DIAGNOSTIC_FIELDS = ("validation_file", "test_file", "training_file")


class ExportFailed(Exception):
    """The export can't be built. `error` is {code, message, param}."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = error


def build_export(context: Context, model_id: str, export_format: str) -> bool:
    """Builds this export if it is waited for; returns False if it is not."""
    if context.stopping.is_set():
        return False
    with transaction(context.sessions) as session:
        claim = exports.claim(
            session,
            model_id=model_id,
            format=export_format,
            lease_seconds=context.settings.lease_seconds,
        )
    if claim is None:
        return False
    folder = Path(tempfile.mkdtemp(prefix="export-", dir=context.scratch))
    try:
        with _supervisor(context, claim) as supervisor:
            _build(context, claim, folder, supervisor)
    except (LostFence, Unavailable) as error:
        log.warning("%s of %s is left to the next attempt: %s", export_format, model_id, error)
    finally:
        shutil.rmtree(folder)
    return True


def _supervisor(context: Context, claim: ExportClaim) -> Supervisor:
    def renew_lease() -> StopRequest:
        with transaction(context.sessions) as session:
            exports.heartbeat(session, claim)
        return StopRequest(cancel=False, pause=False)

    return Supervisor(
        renew_lease=renew_lease,
        read_stop_request=renew_lease,
        stopping=context.stopping,
        limits=Limits.from_settings(context.settings),
    )


def _build(context: Context, claim: ExportClaim, folder: Path, supervisor: Supervisor) -> None:
    try:
        directory = _convert(context, claim, folder, supervisor)
    except ExportFailed as failure:
        with transaction(context.sessions) as session:
            exports.fail(session, claim, error=failure.error)
        return
    name, job_id = claim.model.id.rpartition(":")[2], claim.model.job_id or ""
    if claim.format == DIAGNOSTICS:
        key = export_key(job_id, name, claim.format, claim.attempt, suffix="json")
        report = _report_with_plots(directory, folder / "report.json")
        context.artifacts.put_file(key, report)
        size = report.stat().st_size
    else:
        key = export_key(job_id, name, claim.format, claim.attempt)
        size = _store_tar(context.artifacts, key, directory, f"{name}-{claim.format}")
    with transaction(context.sessions) as session:
        exports.finish(session, claim, storage_key=key, size=size)


def _convert(context: Context, claim: ExportClaim, folder: Path, supervisor: Supervisor) -> Path:
    """Returns the directory to store. Raises ExportFailed; LostFence when the attempt must end."""
    bundle, out = folder / "bundle", folder / "out"
    try:
        context.artifacts.fetch_directory(claim.model.storage_key or "", bundle, claim.model.manifest)
    except Damaged as damage:
        raise ExportFailed(_damaged(damage)) from damage
    if claim.format == "bundle":
        return bundle
    if claim.format == DIAGNOSTICS:
        command = ["diagnose", "--data", str(_fetch_rows(context, claim, folder))]
    else:
        command = ["export", "--format", claim.format]
    command += ["--bundle", str(bundle), "--out", str(out), "--die-with-parent", *context.model_options()]
    _run_engine(context, claim, folder, supervisor, command)
    return out


def _run_engine(
    context: Context, claim: ExportClaim, folder: Path, supervisor: Supervisor, command: list[str]
) -> None:
    error = job_error("export_failed", "The export ended without a result; the worker's log says more.")
    argv = [*context.engine_command, *command]
    with Child(argv, env=child_environment(os.environ), cwd=folder) as child, supervisor.supervising(child):
        for line in child.lines():
            error = line.get("error", error)
        exit_code = child.wait()
    if supervisor.stop_reason is StopReason.SHUTDOWN:
        with transaction(context.sessions) as session:
            exports.release(session, claim)
    if supervisor.stop_reason is not None:
        raise LostFence(f"the export of {claim.model.id} must end: {supervisor.stop_reason}")
    if exit_code != 0:
        raise ExportFailed(error)


def _store_tar(artifacts: Artifacts, key: str, directory: Path, name: str) -> int:
    """Streams a directory into storage as one tar file; returns its size in bytes."""
    upload = artifacts.upload(key)
    try:
        # tarfile only writes to a stream; typeshed requires a complete file object.
        with tarfile.open(fileobj=cast(IO[bytes], upload), mode="w|") as tar:
            tar.add(directory, arcname=name)
    except BaseException:
        upload.abort()
        raise
    upload.commit()
    return upload.size


def _fetch_rows(context: Context, claim: ExportClaim, folder: Path) -> Path:
    """Returns the path of the rows for diagnostics. Raises ExportFailed."""
    path = folder / "rows.jsonl"
    try:
        with transaction(context.sessions) as session:
            key, sha256 = _rows_in_storage(session, claim.model.job_id or "")
        context.artifacts.fetch_file(key, path, sha256)
    except NotFound as error:
        raise ExportFailed(job_error("file_not_found", "The job's rows have been deleted.")) from error
    except Damaged as damage:
        raise ExportFailed(_damaged(damage)) from damage
    return path


def _rows_in_storage(session: Session, job_id: str) -> tuple[str, str]:
    """Returns storage key and SHA-256 of the rows for diagnostics. Raises NotFound when they have been deleted."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound(f"no fine-tuning job {job_id!r}", param="fine_tuning_job_id")
    spec = TrainingSpec.model_validate(job.spec)
    field, reference = next((name, value) for name in _DIAGNOSTIC_FIELDS if (value := getattr(spec, name)))
    if reference.startswith("file-"):
        row = files.for_job(session, owner_id=job.owner_id, file_id=reference)
        return row.storage_key, row.sha256
    sha256 = (job.validation or {})["files"][field]["sha256"]
    return prepared_key(job_id, sha256), sha256


def _report_with_plots(directory: Path, path: Path) -> Path:
    """Writes the report of diagnostics with its plots as `data:` URLs."""
    report = json.loads((directory / "diagnostics.json").read_text())
    plots = {}
    for plot in sorted(directory.glob("*.png")):
        plots[plot.stem] = f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"
    path.write_text(json.dumps({**report, "object": "fine_tuning.job.diagnostics", "plots": plots}))
    return path


def _damaged(damage: Damaged) -> dict[str, Any]:
    return job_error("storage_damaged", f"A stored file can't be used: {damage}.")
