"""Archives of models: fetch the bundle, have the engine write the wanted format, store it as one tar. Diagnostics are
made in the same way, and stored as one JSON file.

It does NOT know formats: the engine does. Nobody's job waits for this; a lost attempt is made again.
"""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from store import exports
from store.db.session import transaction
from store.errors import Damaged, LostFence, NotFound, Unavailable
from store.exports import DIAGNOSTICS, ExportClaim
from store.jobs.fence import StopRequest
from store.storage.artifacts import Artifacts, export_key
from worker.context import Context
from worker.engine_process.child import Child, child_environment
from worker.engine_process.supervisor import Limits, StopReason, Supervisor
from worker.jobs import diagnostics
from worker.jobs.attempt import job_error

log = logging.getLogger(__name__)


class ExportFailed(Exception):
    """It can't be made. `error` is {code, message, param}."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = error


def build_export(context: Context, model_id: str, export_format: str) -> bool:
    """Build this archive if it is waited for; False if it is not, or not any more."""
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
    renew = partial(_renew, context, claim)
    try:
        limits = Limits.from_settings(context.settings)
        with Supervisor(
            renew_lease=renew, read_stop_request=renew, stopping=context.stopping, limits=limits
        ) as watch:
            _build(context, claim, folder, watch)
    except (LostFence, Unavailable) as fault:
        log.warning("%s of %s is left to the next attempt: %s", export_format, model_id, fault)
    finally:
        shutil.rmtree(folder)
    return True


def _build(context: Context, claim: ExportClaim, folder: Path, watch: Supervisor) -> None:
    try:
        made = _make(context, claim, folder, watch)
    except ExportFailed as fault:
        with transaction(context.sessions) as session:
            exports.fail(session, claim, error=fault.error)
        return
    name, job_id = claim.model.id.rpartition(":")[2], claim.model.job_id or ""
    if claim.format == DIAGNOSTICS:
        key = export_key(job_id, name, claim.format, claim.attempt, suffix="json")
        joined = diagnostics.join(made, folder / "joined.json")
        context.artifacts.put_file(key, joined)
        size = joined.stat().st_size
    else:
        key = export_key(job_id, name, claim.format, claim.attempt)
        size = _store_tar(context.artifacts, key, made, f"{name}-{claim.format}")
    with transaction(context.sessions) as session:
        exports.finish(session, claim, storage_key=key, size=size)


def _make(context: Context, claim: ExportClaim, folder: Path, watch: Supervisor) -> Path:
    """The directory to archive. Raises ExportFailed; LostFence when it shall not be finished."""
    bundle, out = folder / "bundle", folder / "out"
    try:
        context.artifacts.fetch_directory(claim.model.storage_key or "", bundle, claim.model.manifest)
    except Damaged as fault:
        raise ExportFailed(job_error("storage_damaged", f"A stored file can't be used: {fault}.")) from fault
    if claim.format == "bundle":
        return bundle
    if claim.format == DIAGNOSTICS:
        command = ["diagnose", "--data", str(_fetch_rows(context, claim, folder))]
    else:
        command = ["export", "--format", claim.format]
    command = [
        *context.engine_command,
        *command,
        "--bundle",
        str(bundle),
        "--out",
        str(out),
        "--die-with-parent",
    ]
    for option, path in (
        ("--model-dir", context.settings.model_dir),
        ("--cache-dir", context.settings.cache_dir),
    ):
        command += [option, str(path)] if path is not None else []
    error = job_error("export_failed", "The export ended without a word; the worker's log says more.")
    environment = child_environment(os.environ)
    with Child(command, env=environment, cwd=folder) as child, watch.supervising(child):
        for outcome in child.lines():
            error = outcome.get("error", error)
        code = child.wait()
    if watch.stop_reason is StopReason.SHUTDOWN:
        with transaction(context.sessions) as session:
            exports.release(session, claim)
    if watch.stop_reason is not None:
        raise LostFence(f"the export of {claim.model.id} shall end: {watch.stop_reason}")
    if code != 0:
        raise ExportFailed(error)
    return out


def _fetch_rows(context: Context, claim: ExportClaim, folder: Path) -> Path:
    try:
        with transaction(context.sessions) as session:
            key, sha256 = diagnostics.rows_of(session, claim.model.job_id or "")
        context.artifacts.fetch_file(key, folder / "rows.jsonl", sha256)
    except NotFound as fault:
        raise ExportFailed(job_error("file_not_found", "The job's rows have been deleted.")) from fault
    except Damaged as fault:
        raise ExportFailed(job_error("storage_damaged", f"A stored file can't be used: {fault}.")) from fault
    return folder / "rows.jsonl"


def _store_tar(artifacts: Artifacts, key: str, directory: Path, name: str) -> int:
    """Store a directory as one tar without a second copy on this machine; returns its size in bytes."""
    upload = artifacts.upload(key)
    try:
        # A stream is only ever written to; typeshed asks for a whole file.
        with tarfile.open(fileobj=cast(IO[bytes], upload), mode="w|") as tar:
            tar.add(directory, arcname=name)
    except BaseException:
        upload.abort()
        raise
    upload.commit()
    return upload.size


def _renew(context: Context, claim: ExportClaim) -> StopRequest:
    with transaction(context.sessions) as session:
        exports.heartbeat(session, claim)
    return StopRequest(cancel=False, pause=False)
