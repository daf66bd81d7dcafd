"""The user's side of studies: create, read, cancel. Each arm with each seed is an ordinary job (store.jobs.jobs).

Another owner's study is never found. The caller sends the hints, after its transaction is committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session, load_only

from store import ids, models
from store.db.pagination import Page, fetch_page
from store.db.states import PURPOSES, TERMINAL, JobState, StudyStatus
from store.db.study_tables import Outcome, Study, StudyEvent, StudyJob, StudyPrefix
from store.db.tables import Job
from store.errors import NotFound, WrongState
from store.jobs import jobs
from store.jobs.shared_prefix import prefix_keys
from store.jobs.spec import MODEL_REFERENCE
from store.storage import files
from store.storage.files import FILE_FIELDS
from store.studies.arms import BaseModelInfo, PlannedArm
from store.studies.events import append_event, write
from store.studies.plan import plan
from store.studies.spec import StudySpec


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job of a study, with its results. Columns that `runs_of` has not read raise when they are accessed."""

    arm: str
    seed: int
    job: Job
    outcome: Outcome | None
    metric: str | None  #: the metric of its rows


def base_model_info(session: Session, model: str | None) -> BaseModelInfo | None:
    """Returns the shape of a base model, or of a fine-tuned one's; None when no worker offers it."""
    base = None if model is None else ids.base_of(model)
    if base is None or not MODEL_REFERENCE.fullmatch(base):
        return None
    with suppress(NotFound):
        info = models.get(session, owner_id="", model_id=base).info
        if "n_layers" in info and "hidden_size" in info:
            return BaseModelInfo(n_layers=int(info["n_layers"]), hidden_size=int(info["hidden_size"]))
    return None


def create(
    session: Session,
    *,
    owner_id: str,
    spec: StudySpec,
    metadata: Mapping[str, str] | None = None,
    study_id: str | None = None,
    reuse_enabled: bool = True,
) -> Study:
    """Creates a study with its first jobs, seed by seed. After the commit, hint each job's id with "prepare".

    With `reuse_enabled` (StoreSettings.reuse_enabled) jobs wait for those that train the stages they share. Raises
    InvalidRequest naming an invalid field.
    """
    spec = spec.completed()
    arms = plan(spec, base_model_info(session, spec.model))
    _lock_files_of_tasks(session, owner_id, spec)
    study = Study(
        id=study_id or ids.new_study_id(),
        owner_id=owner_id,
        spec={**spec.model_dump(mode="json"), "planned": [arm.to_json() for arm in arms]},
        metadata_=dict(metadata or {}),
    )
    session.add(study)
    session.flush()
    runs = [(arm, seed) for seed in spec.seeds for arm in arms if arm.equal_compute_to is None]
    create_jobs(session, study, runs, reuse_enabled=reuse_enabled)
    message = f"Created study {study.id}: {len(arms)} arms with {len(spec.seeds)} seeds, {len(runs)} jobs."
    append_event(session, study.id, "CREATED", message, {"arms": len(arms), "jobs": len(runs)})
    return get(session, owner_id=owner_id, study_id=study.id)


def _lock_files_of_tasks(session: Session, owner_id: str, spec: StudySpec) -> None:
    """Locks them as `create_jobs` does, but raises InvalidRequest with their names in the request."""
    references = [
        (f"tasks[{index}].{field}", reference)
        for index, task in enumerate(spec.tasks or [])
        for field in FILE_FIELDS
        if (reference := getattr(task, field)) is not None
    ]
    files.lock_for_job(session, owner_id=owner_id, references=references)


def create_jobs(
    session: Session,
    study: Study,
    runs: Sequence[tuple[PlannedArm, int]],
    *,
    first: int = 0,
    reuse_enabled: bool = True,
) -> list[str]:
    """Creates a job for each (arm, seed), at the places from `first` on in the study's order. Returns their ids.

    After the commit, hint each with "prepare". Raises InvalidRequest as jobs.create.
    """
    new_jobs = {
        ids.new_job_id(): (arm.with_seed(seed), {"study": study.id, "arm": arm.name}) for arm, seed in runs
    }
    jobs.create_all(session, owner_id=study.owner_id, jobs=new_jobs)
    for place, (job_id, (spec, metadata)) in enumerate(new_jobs.items(), first):
        arm_name = metadata["arm"]
        session.add(StudyJob(job_id=job_id, study_id=study.id, place=place, arm=arm_name, seed=spec.seed))
        for length, key in enumerate(prefix_keys(study.id, spec) if reuse_enabled else [], 1):
            session.add(StudyPrefix(job_id=job_id, length=length, key=key, place=place))
    session.flush()
    return list(new_jobs)


def get(session: Session, *, owner_id: str, study_id: str) -> Study:
    """Returns a study. Raises NotFound for an unknown one or another owner's."""
    study = session.scalar(select(Study).where(Study.id == study_id, Study.owner_id == owner_id))
    if study is None:
        raise NotFound(f"there is no study {study_id!r}", param="study_id")
    return study


def list_page(session: Session, *, owner_id: str, limit: int = 20, after: str | None = None) -> Page[Study]:
    """Returns a page of this owner's studies, newest first. Raises InvalidRequest (param `after`) for an unknown
    cursor.
    """
    owned = select(Study).where(Study.owner_id == owner_id)
    return fetch_page(session, owned, by=(Study.created_at, Study.id), after=after, limit=limit)


def spec_of(study: Study) -> StudySpec:
    """Returns the settings that the user chose, without the planned arms."""
    values = {name: value for name, value in study.spec.items() if name != "planned"}
    if values.get("search") is not None:
        values["search"] = {name: value for name, value in values["search"].items() if name != "closed"}
    return StudySpec.model_validate(values)


def runs_of(session: Session, study_id: str, *, rows: bool = False) -> list[Run]:
    """Returns all jobs of a study in its order, with the results of those that have succeeded.

    Of jobs only id, state and model are read; per-row results, which are large, only with `rows`.
    """
    job_columns = load_only(Job.id, Job.state, Job.fine_tuned_model, raiseload=True)
    columns = [Outcome.costs, Outcome.outcomes] if rows else [Outcome.costs]
    query = (
        select(StudyJob, Job, Outcome, Outcome.outcomes["metric"].astext)
        .join(Job, Job.id == StudyJob.job_id)
        .outerjoin(Outcome, Outcome.job_id == StudyJob.job_id)
        .where(StudyJob.study_id == study_id)
        .options(job_columns, load_only(*columns, raiseload=True))
        .order_by(StudyJob.place)
    )
    return [
        Run(arm=study_job.arm, seed=study_job.seed, job=job, outcome=outcome, metric=metric)
        for study_job, job, outcome, metric in session.execute(query)
    ]


def states_of(session: Session, study_ids: Sequence[str]) -> dict[str, list[JobState]]:
    """Returns the states of each study's jobs."""
    query = select(StudyJob.study_id, Job.state).join(Job, Job.id == StudyJob.job_id)
    states: dict[str, list[JobState]] = {study_id: [] for study_id in study_ids}
    for study_id, state in session.execute(query.where(StudyJob.study_id.in_(study_ids))):
        states[study_id].append(JobState(state))
    return states


def status_of(study: Study, states: Sequence[JobState]) -> StudyStatus:
    """Returns a study's status by the states of its jobs.

    It ends with its last verdict, so that an ended study has all results. It has failed when no job has succeeded.
    """
    unfinished = [state for state in states if state not in TERMINAL]
    if unfinished:
        if all(state == JobState.PAUSED for state in unfinished):
            return "paused"
        return "queued" if all(state in PURPOSES for state in states) else "running"
    if study.finished_at is None:
        return "running"
    if study.cancel_requested_at is not None:
        return "cancelled"
    return "succeeded" if JobState.SUCCEEDED in states else "failed"


def is_trial(session: Session, job_id: str) -> bool:
    """Returns True if the job belongs to a trial of a search (a baseline is none)."""
    query = select(StudyJob.arm, Study.spec["planned"]).join(Study, StudyJob.study_id == Study.id)
    row = session.execute(query.where(StudyJob.job_id == job_id)).one_or_none()
    return row is not None and any(arm["name"] == row[0] and arm.get("trial") for arm in row[1])


def request_cancel(session: Session, *, owner_id: str, study_id: str) -> Study:
    """Cancels all unfinished jobs. May be repeated. Raises NotFound; WrongState when the study has ended."""
    study = session.scalar(
        select(Study).where(Study.id == study_id, Study.owner_id == owner_id).with_for_update()
    )
    if study is None:
        return get(session, owner_id=owner_id, study_id=study_id)
    if study.finished_at is not None:
        raise WrongState("the study has already ended", code="study_ended")
    # True where a cancel has an effect: on later jobs, or on existing ones.
    cancelled = any(arm.get("like") for arm in study.spec["planned"]) or study.spec.get("search") is not None
    for run in runs_of(session, study_id):
        with suppress(WrongState):  # the job has ended
            jobs.request_cancel(session, owner_id=owner_id, job_id=run.job.id)
            cancelled = True
    if not cancelled and study.cancel_requested_at is None:
        raise WrongState("all jobs of the study have ended; its verdict is on its way", code="study_ended")
    if study.cancel_requested_at is None:
        write(session, study_id, cancel_requested_at=func.now())
        append_event(session, study_id, "CANCELLING", "Cancelling all jobs that have not ended.")
    session.expire(study)
    return get(session, owner_id=owner_id, study_id=study_id)


def list_events(
    session: Session, *, owner_id: str, study_id: str, limit: int = 20, after: str | None = None
) -> Page[StudyEvent]:
    """Returns a page of a study's events, newest first.

    Raises NotFound; InvalidRequest (param `after`) for an unknown cursor.
    """
    get(session, owner_id=owner_id, study_id=study_id)
    events = select(StudyEvent).where(StudyEvent.study_id == study_id)
    return fetch_page(session, events, by=(StudyEvent.seq,), after=after, limit=limit)
