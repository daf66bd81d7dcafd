"""The user's side of jobs: create, read, cancel, pause, resume. The worker's side is in leases and endings.

Another owner's job is never found. The caller sends the hints, after its transaction is committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Text, and_, cast, func, insert, select, update
from sqlalchemy.orm import Session

from store import ids
from store.db.pagination import Page, cursor_of, fetch_page
from store.db.session import seconds
from store.db.states import PURPOSES, TERMINAL, JobState
from store.db.tables import Checkpoint, Event, Job
from store.errors import NotFound, WrongState
from store.jobs.spec import TrainingSpec, check_new
from store.jobs.transitions import (
    NewEvent,
    append,
    cancelled,
    close_attempt,
    first_event,
    move,
    paused,
    write,
)
from store.storage import files

#: No trainer runs in these states: a cancel is carried out at once.
_AT_REST = (JobState.VALIDATING_FILES, JobState.QUEUED, JobState.PAUSED)


def create(
    session: Session,
    *,
    owner_id: str,
    spec: TrainingSpec,
    metadata: Mapping[str, str] | None = None,
    job_id: str | None = None,
) -> Job:
    """Creates a job in `validating_files`, with its first event. After the commit, hint (job.id, "prepare").

    Its uploaded files are locked against deletion until this transaction ends. Raises InvalidRequest naming the field
    of a file that is unknown, deleted or another owner's, or as `check_new`.
    """
    check_new(spec)
    files.lock_for_job(session, owner_id=owner_id, references=spec.files().items())
    job = Job(
        id=job_id or ids.new_job_id(),
        owner_id=owner_id,
        state=JobState.VALIDATING_FILES,
        spec=spec.model_dump(mode="json"),
        metadata_=dict(metadata or {}),
        hinted_at=func.now(),
    )
    session.add(job)
    session.flush()
    append(session, job.id, _created(job.id))
    return get(session, owner_id=owner_id, job_id=job.id)


def create_all(
    session: Session, *, owner_id: str, jobs: Sequence[tuple[TrainingSpec, Mapping[str, str]]]
) -> list[str]:
    """Creates many jobs, (settings, metadata) each, in a few statements. Returns their ids; they queue in this order.

    Raises InvalidRequest as `create`, but `check_new` is the caller's.
    """
    references = dict.fromkeys(reference for spec, _ in jobs for reference in spec.files().items())
    files.lock_for_job(session, owner_id=owner_id, references=references)
    rows: list[dict[str, Any]] = [
        {
            "id": ids.new_job_id(),
            "owner_id": owner_id,
            "state": JobState.VALIDATING_FILES,
            "spec": spec.model_dump(mode="json"),
            "metadata_": dict(metadata),
            "event_seq": 1,
        }
        for spec, metadata in jobs
    ]
    session.execute(insert(Job), rows)
    session.execute(insert(Event), [first_event(row["id"], _created(row["id"])) for row in rows])
    # now() is the same for a whole transaction, and the queue is ordered by created_at: a microsecond apart.
    job_ids = [row["id"] for row in rows]
    place = func.array_position(cast(job_ids, ARRAY(Text)), Job.id)
    created_at = func.now() + place * seconds(1e-6)
    statement = update(Job).where(Job.id.in_(job_ids))
    session.execute(statement.values(hinted_at=func.now(), created_at=created_at))
    return job_ids


def _created(job_id: str) -> NewEvent:
    message = f"Created fine-tuning job {job_id}; its files wait to be checked."
    return NewEvent(code="CREATED", message=message)


def get(session: Session, *, owner_id: str, job_id: str) -> Job:
    """Returns a job. Raises NotFound for an unknown one or another owner's."""
    job = session.scalar(select(Job).where(_is_job(owner_id, job_id)))
    if job is None:
        message = f"there is no fine-tuning job {job_id!r}"
        raise NotFound(message, param="fine_tuning_job_id")
    return job


def list_page(
    session: Session,
    *,
    owner_id: str,
    limit: int = 20,
    after: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Page[Job]:
    """Returns a page of this owner's jobs whose metadata contains `metadata`, newest first.

    Raises InvalidRequest (param `after`) for an unknown cursor.
    """
    keyset = select(Job.created_at, Job.id).where(Job.id == after, Job.owner_id == owner_id)
    query = select(Job).where(Job.owner_id == owner_id)
    if metadata:
        query = query.where(Job.metadata_.contains(dict(metadata)))
    cursor = cursor_of(session, keyset, after)
    return fetch_page(session, query, by=(Job.created_at, Job.id), cursor=cursor, limit=limit)


def request_cancel(session: Session, *, owner_id: str, job_id: str) -> Job:
    """Cancels a job: at once unless it runs.

    A running job stays `running`, with `cancel_requested_at`, until its worker has stopped the trainer; however that
    run ends, it ends as cancelled. May be repeated. Raises NotFound; WrongState when the job has already ended.
    """
    is_job = _is_job(owner_id, job_id)
    job = move(session, and_(is_job, Job.state.in_(_AT_REST)), JobState.CANCELLED, cancelled())
    if job is not None:
        close_attempt(session, job.id, job.attempt, "cancelled")
        return job
    job = write(
        session,
        and_(is_job, Job.state == JobState.RUNNING),
        {"cancel_requested_at": func.coalesce(Job.cancel_requested_at, func.now())},
    )
    return job or _refuse(get(session, owner_id=owner_id, job_id=job_id), "cancelled")


def request_pause(session: Session, *, owner_id: str, job_id: str) -> Job:
    """Pauses a job: at once unless it runs; a running one writes a checkpoint first.

    May be repeated. Raises NotFound; WrongState when the job has ended or is being cancelled.
    """
    is_job = _is_job(owner_id, job_id)
    waiting = and_(is_job, Job.state.in_(tuple(PURPOSES)))
    job = move(session, waiting, JobState.PAUSED, paused(), {"paused_from": Job.state})
    if job is not None:
        close_attempt(session, job.id, job.attempt, "paused")
        return job
    job = write(
        session,
        and_(is_job, Job.state == JobState.RUNNING, Job.cancel_requested_at.is_(None)),
        {"pause_requested_at": func.coalesce(Job.pause_requested_at, func.now())},
    )
    if job is not None:
        return job
    job = get(session, owner_id=owner_id, job_id=job_id)
    return job if job.state == JobState.PAUSED else _refuse(job, "paused")


def resume(session: Session, *, owner_id: str, job_id: str) -> Job:
    """Resumes a paused job in the state that it was paused from. After the commit, hint (job.id, PURPOSES[job.state]).

    Raises NotFound; WrongState when the job is not paused.
    """
    event = NewEvent(code="RESUMED", message="The job is resumed.")
    values = {"paused_from": None, "not_before": None, "hinted_at": func.now()}
    for state in PURPOSES:
        guard = and_(_is_job(owner_id, job_id), Job.state == JobState.PAUSED, Job.paused_from == state)
        job = move(session, guard, state, event, values)
        if job is not None:
            return job
    return _refuse(get(session, owner_id=owner_id, job_id=job_id), "resumed")


def list_events(
    session: Session, *, owner_id: str, job_id: str, limit: int = 20, after: str | None = None
) -> Page[Event]:
    """Returns a page of a job's events, newest first.

    Raises NotFound; InvalidRequest (param `after`) for an unknown cursor.
    """
    get(session, owner_id=owner_id, job_id=job_id)
    keyset = select(Event.seq).where(Event.job_id == job_id, Event.id == after)
    query = select(Event).where(Event.job_id == job_id)
    return fetch_page(session, query, by=(Event.seq,), cursor=cursor_of(session, keyset, after), limit=limit)


def events_after(session: Session, *, owner_id: str, job_id: str, seq: int, limit: int = 100) -> list[Event]:
    """Returns up to `limit` events numbered above `seq`, in order and without gaps. Raises NotFound.

    A stream ends when the job's state, read BEFORE the events, is terminal and no event is left.
    """
    get(session, owner_id=owner_id, job_id=job_id)
    query = select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq)
    return list(session.scalars(query.limit(limit)))


def list_checkpoints(
    session: Session, *, owner_id: str, job_id: str, limit: int = 10, after: str | None = None
) -> Page[Checkpoint]:
    """Returns a page of a job's stage checkpoints, which are models, newest first.

    Step checkpoints are left out: they serve to resume from, and come and go. Raises NotFound; InvalidRequest (param
    `after`) for an unknown cursor.
    """
    get(session, owner_id=owner_id, job_id=job_id)
    by = (Checkpoint.created_at, Checkpoint.id)
    keyset = select(*by).where(Checkpoint.job_id == job_id, Checkpoint.id == after)
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.kind == "stage")
    return fetch_page(session, query, by=by, cursor=cursor_of(session, keyset, after), limit=limit)


def _is_job(owner_id: str, job_id: str) -> ColumnElement[bool]:
    return and_(Job.id == job_id, Job.owner_id == owner_id)


def _refuse(job: Job, participle: str) -> Job:
    """Raises the WrongState that says why a job can't be cancelled, paused or resumed."""
    if job.state in TERMINAL:
        raise WrongState(f"the job has already ended: it is {job.state}", code="job_ended")
    if job.cancel_requested_at is not None:
        raise WrongState("the job is being cancelled", code="job_being_cancelled")
    raise WrongState(f"a job that is {job.state} can't be {participle}")
