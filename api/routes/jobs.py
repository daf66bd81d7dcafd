"""Fine-tuning jobs: create, list, retrieve, cancel, pause, resume. Their events are in `api.routes.events`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session

from api.deps import After, Caller, Db, IdempotencyKey, Limit, Services, ServicesDep, body_hash
from api.schemas.common import Listing
from api.schemas.diagnostics import Diagnostics, DiagnosticsPending
from api.schemas.job_object import CheckpointObject, JobObject
from api.schemas.jobs import JobRequest
from api.stored_response import stored_response
from store import exports, idempotency
from store.db.pagination import Page
from store.db.states import PURPOSES, JobState
from store.db.tables import Checkpoint, Job
from store.errors import InvalidRequest, WrongState
from store.ids import new_job_id
from store.jobs import checkpoints, jobs
from store.jobs.spec import TrainingSpec
from store.logs import bound
from store.settings import StoreSettings

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])

_DIAGNOSTICS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Diagnostics},
    202: {
        "model": DiagnosticsPending,
        "description": "A worker computes them: retry after Retry-After seconds",
    },
}

_FILTER = re.compile(r"metadata\[(.+)\]")


async def metadata_filter(request: Request) -> dict[str, str]:
    """Parses `?metadata[k]=v`, which FastAPI has no parameter type for."""
    return {
        match[1]: value
        for name, value in request.query_params.items()
        if (match := _FILTER.fullmatch(name)) is not None
    }


@router.post("")
async def create_job(
    body: JobRequest, caller: Caller, db: Db, services: ServicesDep, idempotency_key: IdempotencyKey = None
) -> JobObject:
    """Creates a job. It is in `validating_files` until a worker has checked its rows line by line.

    With `dry_run` it then ends as `succeeded`, with an `estimate` of rows, steps, memory and time; nothing is trained.
    """
    _check_integrations(body, services.settings)
    job = await db(_create, owner_id=caller.id, body=body, idempotency_key=idempotency_key)
    with bound(job_id=job.id):
        log.info("accepted from %s", caller.id)
    _hint(services, job)
    return JobObject.of(job)


def _check_integrations(body: JobRequest, settings: StoreSettings) -> None:
    """Raises InvalidRequest for a tracker that the operator has not enabled."""
    for index, integration in enumerate(body.integrations):
        if integration.type not in settings.enabled_integrations:
            message = f"{integration.type} is not enabled here: the operator lists it in HEFT_INTEGRATIONS"
            raise InvalidRequest(message, param=f"integrations[{index}].type")


def _create(session: Session, *, owner_id: str, body: JobRequest, idempotency_key: str | None) -> Job:
    job_id = new_job_id()
    if idempotency_key is not None:
        reserved = idempotency.reserve(
            session,
            owner_id=owner_id,
            key=idempotency_key,
            body_hash=body_hash(body.as_sent()),
            resource_id=job_id,
        )
        if not reserved.is_new:
            return jobs.get(session, owner_id=owner_id, job_id=reserved.resource_id)
    return jobs.create(session, owner_id=owner_id, spec=body.spec(), metadata=body.metadata, job_id=job_id)


def _hint(services: Services, job: Job) -> None:
    """Notifies the workers, after the commit. Does not wait for the broker: without it, workers poll the database."""
    purpose = PURPOSES.get(JobState(job.state))
    if purpose is not None:
        services.hints.hint(job.id, purpose)


@router.get("")
async def list_jobs(
    caller: Caller,
    db: Db,
    metadata: Annotated[Mapping[str, str], Depends(metadata_filter)],
    dry_run: bool = False,
    after: After = None,
    limit: Limit = 20,
) -> Listing[JobObject]:
    """Jobs, newest first. `metadata[key]=value`, repeatable, returns only jobs that have all of them.

    `dry_run=true` lists dry runs instead.
    """
    page = await db(
        jobs.list_page, owner_id=caller.id, limit=limit, after=after, metadata=metadata, dry_run=dry_run
    )
    return Listing.of([JobObject.of(job) for job in page.items], has_more=page.has_more)


@router.get("/{job_id}")
async def retrieve_job(job_id: str, caller: Caller, db: Db) -> JobObject:
    """A job with its status, progress and, at the end, its evaluation."""
    return JobObject.of(await db(jobs.get, owner_id=caller.id, job_id=job_id))


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, caller: Caller, db: Db) -> JobObject:
    """Cancels a job: a waiting one at once, a running one within seconds."""
    return JobObject.of(await db(jobs.request_cancel, owner_id=caller.id, job_id=job_id))


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, caller: Caller, db: Db) -> JobObject:
    """Pauses a job. A running one writes a checkpoint first."""
    return JobObject.of(await db(jobs.request_pause, owner_id=caller.id, job_id=job_id))


@router.post("/{job_id}/resume")
async def resume_job(job_id: str, caller: Caller, db: Db, services: ServicesDep) -> JobObject:
    """Resumes a paused job from its checkpoint."""
    job = await db(jobs.resume, owner_id=caller.id, job_id=job_id)
    _hint(services, job)
    return JobObject.of(job)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, caller: Caller, db: Db, after: After = None, limit: Limit = 10
) -> Listing[CheckpointObject]:
    """The checkpoints at the ends of a job's stages and of its last epochs, newest first. Each is a model too."""
    page, best_id = await db(_checkpoints, owner_id=caller.id, job_id=job_id, limit=limit, after=after)
    items = [CheckpointObject.of(checkpoint, best_id) for checkpoint in page.items]
    return Listing.of(items, has_more=page.has_more)


def _checkpoints(
    session: Session, *, owner_id: str, job_id: str, limit: int, after: str | None
) -> tuple[Page[Checkpoint], str | None]:
    page = jobs.list_checkpoints(session, owner_id=owner_id, job_id=job_id, limit=limit, after=after)
    job = jobs.get(session, owner_id=owner_id, job_id=job_id)
    return page, checkpoints.best(session, job_id, TrainingSpec.model_validate(job.spec).best_by)


@router.get("/{job_id}/diagnostics", responses=_DIAGNOSTICS_RESPONSES, response_class=Response)
async def job_diagnostics(job_id: str, caller: Caller, db: Db, services: ServicesDep) -> Response:
    """Effects of the job's stages on weights, representations, curvature and general knowledge, with plots.

    A worker computes them at the first request.
    """
    export = await db(exports.request_diagnostics, owner_id=caller.id, job_id=job_id)
    if export.state == "failed":
        error = export.error or {}
        raise WrongState(error["message"], param=error["param"], code=error["code"])
    if export.storage_key is None:
        services.hints.export(export.model_id, export.format)
        pending = DiagnosticsPending(job=job_id, status=export.state)
        return JSONResponse(pending.model_dump(), status_code=202, headers={"Retry-After": "5"})
    return await stored_response(
        services.artifacts, export.storage_key, media_type="application/json", size=export.bytes
    )
