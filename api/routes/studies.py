"""Studies: comparisons of several methods on the same data. Their jobs are ordinary ones, see `api.routes.jobs`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from anyio import to_thread
from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.database import Database
from api.deps import After, Caller, Db, IdempotencyKey, Limit, ServicesDep, body_hash
from api.schemas.common import Listing
from api.schemas.studies import Estimate, StudyEventObject, StudyObject, StudyRequest, StudySummary
from store import idempotency
from store.db.pagination import Page
from store.db.states import PURPOSES, JobState
from store.db.study_tables import Study
from store.errors import Damaged, InvalidRequest, NotFound
from store.ids import new_study_id
from store.storage import files
from store.storage.artifacts import Artifacts
from store.studies import estimates, studies
from store.studies.studies import Run

log = logging.getLogger(__name__)

#: With fewer rows an accuracy's confidence interval is wider than 40 points. Larger files are assumed to have more.
_MIN_ROWS, _SMALL_FILE_BYTES = 20, 256 * 1024

router = APIRouter(prefix="/v1/studies", tags=["Studies"])


@router.post("")
async def create_study(
    body: StudyRequest, caller: Caller, db: Db, services: ServicesDep, idempotency_key: IdempotencyKey = None
) -> StudyObject | Estimate:
    """Creates a study: a job for every arm and seed. `dry_run` returns an estimate of its costs instead."""
    reuse_enabled = services.settings.reuse_enabled
    if body.dry_run:
        return Estimate.model_validate(
            await db(
                estimates.estimate_study, owner_id=caller.id, spec=body.spec(), reuse_enabled=reuse_enabled
            )
        )
    await _check_rows(body, caller.id, db, services.artifacts)
    study, runs = await db(
        _create, owner_id=caller.id, body=body, idempotency_key=idempotency_key, reuse_enabled=reuse_enabled
    )
    log.info("accepted %s from %s, %d jobs", study.id, caller.id, len(runs))
    for run in runs:
        purpose = PURPOSES.get(JobState(run.job.state))
        if purpose is not None:
            services.hints.hint(run.job.id, purpose)
    return StudyObject.of(study, runs)


def _create(
    session: Session, *, owner_id: str, body: StudyRequest, idempotency_key: str | None, reuse_enabled: bool
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
    study = studies.create(
        session,
        owner_id=owner_id,
        spec=body.spec(),
        metadata=body.metadata,
        study_id=study_id,
        reuse_enabled=reuse_enabled,
    )
    return study, studies.runs_of(session, study.id)


async def _check_rows(body: StudyRequest, owner_id: str, db: Database, artifacts: Artifacts) -> None:
    """Refuses uploaded files with too few rows to compare methods on.

    Reads only small files, and outside of a transaction. Missing files are left to `studies.create`.
    """
    for field, key in await db(_small_files, owner_id=owner_id, evaluated=_evaluated_files(body)):
        rows = None
        with suppress(Damaged):  # it may have been deleted meanwhile
            rows = await to_thread.run_sync(_count_rows, artifacts, key)
        if rows is not None and rows < _MIN_ROWS:
            message = f"a comparison needs at least {_MIN_ROWS} rows, and the file has {rows}"
            raise InvalidRequest(message, param=field)


def _evaluated_files(body: StudyRequest) -> list[tuple[str, str]]:
    """Returns (field, file id) of the uploaded files that arms are compared or selected on."""
    fields: list[tuple[str, str | None]] = []
    if body.tasks is not None:
        for index, data in enumerate(body.tasks):
            field = "test_file" if data.test_file else "validation_file"
            fields.append((f"tasks[{index}].{field}", getattr(data, field)))
    else:
        uses_validation = body.search is not None or not body.test_file
        fields = [
            ("test_file", body.test_file),
            ("validation_file", body.validation_file if uses_validation else None),
        ]
    return [(field, file) for field, file in fields if file is not None and file.startswith("file-")]


def _small_files(
    session: Session, *, owner_id: str, evaluated: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Returns (field, storage key) of the small files."""
    small: list[tuple[str, str]] = []
    for field, file_id in evaluated:
        with suppress(NotFound):
            file = files.get(session, owner_id=owner_id, file_id=file_id)
            if file.bytes <= _SMALL_FILE_BYTES:
                small.append((field, file.storage_key))
    return small


def _count_rows(artifacts: Artifacts, key: str) -> int:
    content = b"".join(artifacts.iter_bytes(key))
    return sum(bool(line.strip()) for line in content.splitlines())


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
    """A study with its arms' accuracies so far and their comparisons."""
    return StudyObject.of(*await db(_read, owner_id=caller.id, study_id=study_id))


@router.post("/{study_id}/cancel")
async def cancel_study(study_id: str, caller: Caller, db: Db) -> StudyObject:
    """Cancels all unfinished jobs of a study. Finished ones are still compared."""
    await db(studies.request_cancel, owner_id=caller.id, study_id=study_id)
    return StudyObject.of(*await db(_read, owner_id=caller.id, study_id=study_id))


@router.get("/{study_id}/events")
async def list_study_events(
    study_id: str, caller: Caller, db: Db, after: After = None, limit: Limit = 20
) -> Listing[StudyEventObject]:
    """Events of a study, newest first. Each of its jobs has events of its own."""
    page = await db(studies.list_events, owner_id=caller.id, study_id=study_id, limit=limit, after=after)
    return Listing.of([StudyEventObject.of(event) for event in page.items], has_more=page.has_more)
