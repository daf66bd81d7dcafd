"""Studies: several methods on the same data, compared. Their jobs are ordinary ones, see `api.routes.jobs`."""

from __future__ import annotations

import logging

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import After, Caller, Db, Held, IdempotencyKey, Limit, body_hash
from api.schemas.common import Listing
from api.schemas.studies import Estimate, StudyEventObject, StudyObject, StudyRequest, StudySummary
from store import estimates, files, idempotency, studies
from store.artifacts import Artifacts
from store.errors import InvalidRequest
from store.ids import new_study_id
from store.page import Page
from store.states import PURPOSES, JobState
from store.studies import Run
from store.study_tables import Study

log = logging.getLogger(__name__)

#: On fewer rows an arm's interval is wider than 40 points. Files beyond so many bytes are taken to have more.
_LEAST_ROWS, _SMALL_BYTES = 20, 256 * 1024

router = APIRouter(prefix="/v1/studies", tags=["Studies"])


@router.post("")
async def create_study(
    body: StudyRequest, caller: Caller, db: Db, held: Held, idempotency_key: IdempotencyKey = None
) -> StudyObject | Estimate:
    """Start a study: a job for every arm with every seed. `dry_run` says what it would take instead."""
    if body.dry_run:
        return Estimate.model_validate(await db(estimates.of_study, owner_id=caller.id, spec=body.spec()))
    study, runs = await db(
        _create, owner_id=caller.id, body=body, idempotency_key=idempotency_key, artifacts=held.artifacts
    )
    log.info("accepted %s from %s, %d jobs", study.id, caller.id, len(runs))
    for run in runs:
        purpose = PURPOSES.get(JobState(run.job.state))
        if purpose is not None:
            held.hints.hint(run.job.id, purpose)
    return StudyObject.of(study, runs)


def _create(
    session: Session, *, owner_id: str, body: StudyRequest, idempotency_key: str | None, artifacts: Artifacts
) -> tuple[Study, list[Run]]:
    study_id = new_study_id()
    if idempotency_key is not None:
        reserved = idempotency.reserve(
            session,
            owner_id=owner_id,
            key=idempotency_key,
            body_hash=body_hash(body.as_sent()),
            resource_id=study_id,
        )
        if not reserved.is_new:
            return _read(session, owner_id=owner_id, study_id=reserved.resource_id)
    _check_rows(session, artifacts, owner_id, "test_file" if body.test_file else "validation_file", body)
    study = studies.create(
        session, owner_id=owner_id, spec=body.spec(), metadata=body.metadata, study_id=study_id
    )
    return study, studies.runs_of(session, study.id)


def _check_rows(
    session: Session, artifacts: Artifacts, owner_id: str, field: str, body: StudyRequest
) -> None:
    """Refuse an uploaded file of so few rows that nothing could be told apart on it. Only small ones are read."""
    reference = getattr(body, field)
    if reference is None or not reference.startswith("file-"):
        return
    files.lock_for_job(session, owner_id=owner_id, references=[(field, reference)])
    file = files.get(session, owner_id=owner_id, file_id=reference)
    if file.bytes > _SMALL_BYTES:
        return
    content = b"".join(artifacts.iter_bytes(file.storage_key))
    rows = sum(bool(line.strip()) for line in content.splitlines())
    if rows < _LEAST_ROWS:
        raise InvalidRequest(f"{rows} rows tell no methods apart: give {_LEAST_ROWS} or more", param=field)


def _read(session: Session, *, owner_id: str, study_id: str) -> tuple[Study, list[Run]]:
    study = studies.get(session, owner_id=owner_id, study_id=study_id)
    return study, studies.runs_of(session, study.id)


@router.get("")
async def list_studies(
    caller: Caller, db: Db, after: After = None, limit: Limit = 20
) -> Listing[StudySummary]:
    """Studies, newest first, without their arms."""
    page, states = await db(_page, owner_id=caller.id, limit=limit, after=after)
    items = [StudySummary.of(study, states[study.id]) for study in page.items]
    return Listing.of(items, has_more=page.has_more)


def _page(
    session: Session, *, owner_id: str, limit: int, after: str | None
) -> tuple[Page[Study], dict[str, list[JobState]]]:
    page = studies.list_page(session, owner_id=owner_id, limit=limit, after=after)
    return page, studies.states_of(session, [study.id for study in page.items])


@router.get("/{study_id}")
async def retrieve_study(study_id: str, caller: Caller, db: Db) -> StudyObject:
    """A study: its arms with what they reached so far, and what may be said of their differences."""
    return StudyObject.of(*await db(_read, owner_id=caller.id, study_id=study_id))


@router.post("/{study_id}/cancel")
async def cancel_study(study_id: str, caller: Caller, db: Db) -> StudyObject:
    """End every job that has not ended. What has ended is judged."""
    await db(studies.request_cancel, owner_id=caller.id, study_id=study_id)
    return StudyObject.of(*await db(_read, owner_id=caller.id, study_id=study_id))


@router.get("/{study_id}/events")
async def list_study_events(
    study_id: str, caller: Caller, db: Db, after: After = None, limit: Limit = 20
) -> Listing[StudyEventObject]:
    """What happened to a study, the latest first. Each job has events of its own."""
    page = await db(studies.list_events, owner_id=caller.id, study_id=study_id, limit=limit, after=after)
    return Listing.of([StudyEventObject.of(event) for event in page.items], has_more=page.has_more)
