"""The user's side of jobs: create, read, and say what is wanted. The worker's side is in leases.

Every function takes the owner, and another owner's job is not found. Nothing here sends a message: the caller
does, after its transaction is committed.
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
from store.errors import Conflict, NotFound
from store.jobs.spec import FILE_FIELDS, TrainingSpec, check_known_datasets
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

#: Nobody trains on these: cancel and pause are carried out at once.
_AT_REST = (JobState.VALIDATING_FILES, JobState.QUEUED, JobState.PAUSED)


def create(
    session: Session,
    *,
    owner_id: str,
    spec: TrainingSpec,
    metadata: Mapping[str, str] | None = None,
    job_id: str | None = None,
) -> Job:
    """A new job in `validating_files`, with its first event.

    Its uploaded files are held against deletion until this transaction ends. Raises InvalidRequest naming the
    field of a file that is not there, is deleted, or is another owner's, and of what a dataset's name shows to be
    wrong. After the commit, hint (job.id, "prepare").
    """
    check_known_datasets(spec)
    uploaded = [(field, value) for field in FILE_FIELDS if (value := getattr(spec, field)) is not None]
    files.lock_for_job(
        session,
        owner_id=owner_id,
        references=[(field, value) for field, value in uploaded if value.startswith("file-")],
    )
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
    session: Session, *, owner_id: str, wanted: Sequence[tuple[TrainingSpec, Mapping[str, str]]]
) -> list[str]:
    """As `create`, many jobs of the same files in a few statements; their ids. They queue in this order.

    What datasets' names show of them has been looked at: a study's arms are, when they are built.
    """
    for field in FILE_FIELDS:
        uploaded = {value for spec, _ in wanted if (value := getattr(spec, field)) is not None}
        references = [(field, value) for value in sorted(uploaded) if value.startswith("file-")]
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
        for spec, metadata in wanted
    ]
    session.execute(insert(Job), rows)
    session.execute(insert(Event), [first_event(row["id"], _created(row["id"])) for row in rows])
    # One transaction has one time; the queue takes jobs in the order of theirs.
    made = [row["id"] for row in rows]
    place = func.array_position(cast(made, ARRAY(Text)), Job.id)
    in_order = update(Job).where(Job.id.in_(made))
    later = func.now() + place * seconds(1e-6)
    session.execute(
        in_order.values(hinted_at=func.now(), created_at=later).execution_options(synchronize_session=False)
    )
    return made


def _created(job_id: str) -> NewEvent:
    return NewEvent(
        code="CREATED", message=f"Created fine-tuning job {job_id}; its files wait to be checked."
    )


def get(session: Session, *, owner_id: str, job_id: str) -> Job:
    """Raises NotFound, for another owner's job too."""
    job = session.scalar(select(Job).where(_mine(owner_id, job_id)))
    if job is None:
        raise NotFound(f"no fine-tuning job {job_id!r}", param="fine_tuning_job_id", code="job_not_found")
    return job


def list_page(
    session: Session,
    *,
    owner_id: str,
    limit: int = 20,
    after: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Page[Job]:
    """This owner's jobs, newest first, those whose metadata has all of `metadata`.

    Raises InvalidRequest (param `after`) for an unknown cursor.
    """
    place = select(Job.created_at, Job.id).where(Job.id == after, Job.owner_id == owner_id)
    query = select(Job).where(Job.owner_id == owner_id)
    if metadata:
        query = query.where(Job.metadata_.contains(dict(metadata)))
    return fetch_page(
        session,
        query,
        by=(Job.created_at, Job.id),
        cursor=cursor_of(session, place, after),
        limit=limit,
    )


def request_cancel(session: Session, *, owner_id: str, job_id: str) -> Job:
    """End a job. At once where nobody trains on it; a running one is told, and stays `running` until its
    worker has ended the trainer (`cancel_requested_at` is set, and whatever the run does from now on it ends
    as cancelled).

    Asking again is fine. Raises NotFound; Conflict when the job has already ended.
    """
    mine = _mine(owner_id, job_id)
    job = move(session, and_(mine, Job.state.in_(_AT_REST)), JobState.CANCELLED, cancelled())
    if job is not None:
        close_attempt(session, job.id, job.attempt, "cancelled")
        return job
    job = write(
        session,
        and_(mine, Job.state == JobState.RUNNING),
        {"cancel_requested_at": func.coalesce(Job.cancel_requested_at, func.now())},
    )
    return job or _refuse(get(session, owner_id=owner_id, job_id=job_id), "cancelled")


def request_pause(session: Session, *, owner_id: str, job_id: str) -> Job:
    """Put a job aside. At once where nobody trains on it; a running one is told, writes a checkpoint and then
    pauses.

    Asking again is fine. Raises NotFound; Conflict when the job has ended or is being cancelled.
    """
    mine = _mine(owner_id, job_id)
    waiting = and_(mine, Job.state.in_((JobState.VALIDATING_FILES, JobState.QUEUED)))
    job = move(session, waiting, JobState.PAUSED, paused(), {"paused_from": Job.state})
    if job is not None:
        close_attempt(session, job.id, job.attempt, "paused")
        return job
    job = write(
        session,
        and_(mine, Job.state == JobState.RUNNING, Job.cancel_requested_at.is_(None)),
        {"pause_requested_at": func.coalesce(Job.pause_requested_at, func.now())},
    )
    if job is not None:
        return job
    job = get(session, owner_id=owner_id, job_id=job_id)
    return job if job.state == JobState.PAUSED else _refuse(job, "paused")


def resume(session: Session, *, owner_id: str, job_id: str) -> Job:
    """Let a paused job go on from where it was. After the commit, hint (job.id, PURPOSES[job.state]).

    Raises NotFound; Conflict when the job is not paused.
    """
    event = NewEvent(code="RESUMED", message="The job goes on.")
    values = {"paused_from": None, "not_before": None, "hinted_at": func.now()}
    for state in PURPOSES:
        guard = and_(_mine(owner_id, job_id), Job.state == JobState.PAUSED, Job.paused_from == state)
        job = move(session, guard, state, event, values)
        if job is not None:
            return job
    return _refuse(get(session, owner_id=owner_id, job_id=job_id), "resumed")


def list_events(
    session: Session, *, owner_id: str, job_id: str, limit: int = 20, after: str | None = None
) -> Page[Event]:
    """A job's events, the latest first. Raises NotFound; InvalidRequest (param `after`) for an unknown
    cursor.
    """
    get(session, owner_id=owner_id, job_id=job_id)
    place = select(Event.seq).where(Event.job_id == job_id, Event.id == after)
    query = select(Event).where(Event.job_id == job_id)
    return fetch_page(session, query, by=(Event.seq,), cursor=cursor_of(session, place, after), limit=limit)


def events_after(session: Session, *, owner_id: str, job_id: str, seq: int, limit: int = 100) -> list[Event]:
    """Up to `limit` events numbered above `seq`, in order: 1, 2, 3, … without gaps.

    A stream ends when a job's state, read BEFORE the events, is terminal and no event is left. Raises
    NotFound.
    """
    get(session, owner_id=owner_id, job_id=job_id)
    query = select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq)
    return list(session.scalars(query.limit(limit)))


def list_checkpoints(
    session: Session, *, owner_id: str, job_id: str, limit: int = 10, after: str | None = None
) -> Page[Checkpoint]:
    """The checkpoints of a job that can be asked as models (the end of each stage), the latest first.

    Those inside a stage serve to resume from and come and go. Raises NotFound; InvalidRequest for an unknown
    cursor.
    """
    get(session, owner_id=owner_id, job_id=job_id)
    place = select(Checkpoint.created_at, Checkpoint.id).where(
        Checkpoint.job_id == job_id, Checkpoint.id == after
    )
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.kind == "stage")
    return fetch_page(
        session,
        query,
        by=(Checkpoint.created_at, Checkpoint.id),
        cursor=cursor_of(session, place, after),
        limit=limit,
    )


def _mine(owner_id: str, job_id: str) -> ColumnElement[bool]:
    return and_(Job.id == job_id, Job.owner_id == owner_id)


def _refuse(job: Job, wish: str) -> Job:
    if job.state in TERMINAL:
        raise Conflict(f"the job has already ended: {job.state}", code="job_ended")
    if job.cancel_requested_at is not None:
        raise Conflict("the job is being cancelled", code="job_being_cancelled")
    raise Conflict(f"a job that is {job.state} can't be {wish}", code="wrong_state")
