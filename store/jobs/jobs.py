"""The user's side of jobs: create, read, cancel, pause, resume. The worker's side is in leases and endings.

Another owner's job is never found. The caller sends the hints, after its transaction is committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, func, insert, select
from sqlalchemy.orm import Session

from store import ids
from store.db.pagination import Page, fetch_page
from store.db.session import seconds
from store.db.states import PURPOSES, TERMINAL, JobState
from store.db.tables import Checkpoint, Event, Job
from store.errors import NotFound, WrongState
from store.jobs import checkpoints, start_models
from store.jobs.spec import TrainingSpec, check_new
from store.jobs.transitions import NewEvent, cancelled, close_attempt, event_row, move, paused, write
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

    Its uploaded files, and the fine-tuned model that it goes on from, are locked against deletion until this
    transaction ends. Raises InvalidRequest naming the field of one that is unknown, deleted or another owner's, or of a
    setting that contradicts that model's, or as `check_new`.
    """
    check_new(spec)
    job_id = job_id or ids.new_job_id()
    create_all(session, owner_id=owner_id, jobs={job_id: (spec, metadata or {})})
    return get(session, owner_id=owner_id, job_id=job_id)


def create_all(
    session: Session, *, owner_id: str, jobs: Mapping[str, tuple[TrainingSpec, Mapping[str, str]]]
) -> None:
    """Creates jobs, {id: (settings, metadata)}, in three statements; they queue in this order.

    Raises InvalidRequest as `create`, but `check_new` is the caller's.
    """
    references = dict.fromkeys(reference for spec, _ in jobs.values() for reference in spec.files().items())
    files.lock_for_job(session, owner_id=owner_id, references=references)
    start_models.lock_for_jobs(session, owner_id=owner_id, specs=(spec for spec, _ in jobs.values()))
    rows = [
        {
            "id": job_id,
            "owner_id": owner_id,
            "state": JobState.VALIDATING_FILES,
            "spec": spec.model_dump(mode="json"),
            "metadata_": dict(metadata),
            # now() is the same for a whole transaction, and the queue is ordered by created_at: a microsecond apart.
            "created_at": func.now() + seconds(1e-6 * place),
            "hinted_at": func.now(),
            "event_seq": 1,
        }
        for place, (job_id, (spec, metadata)) in enumerate(jobs.items())
    ]
    session.execute(insert(Job).values(rows))
    session.execute(insert(Event), [_first_event(job_id) for job_id in jobs])


def _first_event(job_id: str) -> dict[str, Any]:
    message = f"Created fine-tuning job {job_id}; its files wait to be checked."
    return event_row(job_id, seq=1, attempt=0, event=NewEvent(code="CREATED", message=message))


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
    dry_run: bool = False,
) -> Page[Job]:
    """Returns a page of this owner's jobs, or dry runs, whose metadata contains `metadata`, newest first.

    Raises InvalidRequest (param `after`) for an unknown cursor.
    """
    owned = select(Job).where(Job.owner_id == owner_id)
    is_dry_run = Job.spec.has_key("dry_run")  # stored only where it is true
    conditions = [is_dry_run if dry_run else ~is_dry_run]
    conditions += [Job.metadata_.contains(dict(metadata))] if metadata else []
    return fetch_page(session, owned, *conditions, by=(Job.created_at, Job.id), after=after, limit=limit)


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
    events = select(Event).where(Event.job_id == job_id)
    return fetch_page(session, events, by=(Event.seq,), after=after, limit=limit)


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
    """Returns a page of a job's checkpoints of epochs and stages, which are models, newest first, without deleted ones.

    Step checkpoints are left out: they serve to resume from, and come and go. Raises NotFound; InvalidRequest (param
    `after`) for an unknown cursor.
    """
    get(session, owner_id=owner_id, job_id=job_id)
    of_job = select(Checkpoint).where(Checkpoint.job_id == job_id)
    by = (Checkpoint.created_at, Checkpoint.id)
    return fetch_page(session, of_job, checkpoints.is_model(), by=by, after=after, limit=limit)


def _is_job(owner_id: str, job_id: str) -> ColumnElement[bool]:
    return and_(Job.id == job_id, Job.owner_id == owner_id)


def _refuse(job: Job, participle: str) -> Job:
    """Raises the WrongState that says why a job can't be cancelled, paused or resumed."""
    if job.state in TERMINAL:
        raise WrongState(f"the job has already ended: it is {job.state}", code="job_ended")
    if job.cancel_requested_at is not None:
        raise WrongState("the job is being cancelled", code="job_being_cancelled")
    raise WrongState(f"a job that is {job.state} can't be {participle}")
