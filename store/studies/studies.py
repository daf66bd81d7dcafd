"""The user's side of studies: create, read, cancel. Every arm with every seed is an ordinary job (store.jobs.jobs).

Every function takes the owner, and another owner's study is not found. Nothing here sends a message: the caller does,
after its transaction is committed. It does NOT judge: see verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session, load_only

from store import ids, models
from store.db.pagination import Page, cursor_of, fetch_page
from store.db.states import TERMINAL, JobState
from store.db.study_tables import Outcome, Study, StudyEvent, StudyJob, StudyPrefix
from store.db.tables import Job
from store.errors import Conflict, NotFound
from store.jobs import jobs
from store.jobs.shared_prefix import prefix_keys
from store.jobs.spec import MODEL_REFERENCE
from store.storage import files
from store.studies.arms import BaseModelInfo, PlannedArm
from store.studies.events import append_event, write
from store.studies.plan import plan
from store.studies.spec import FILES, StudySpec


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job of a study, and what it left for comparisons. What was not read is not there to be looked at."""

    arm: str
    seed: int
    job: Job
    outcome: Outcome | None
    metric: str | None  #: what its rows were measured by


def base_model_info(session: Session, model: str | None) -> BaseModelInfo | None:
    """What a worker has told of this base model, if any has."""
    if model is None or not MODEL_REFERENCE.fullmatch(model):
        return None
    with suppress(NotFound):
        info = models.get(session, owner_id="", model_id=model).info
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
    """A new study with the jobs that it begins with, seed by seed. Raises InvalidRequest naming the field that can't
    be: nothing is queued then. After the commit, hint every job's id with "prepare".

    `reuse_enabled`: whether the operator lets stages be reused, so that jobs wait for those that train what they share.
    """
    spec = spec.completed()
    arms = plan(spec, base_model_info(session, spec.model))
    _hold_files_of_tasks(session, owner_id, spec)
    study = Study(
        id=study_id or ids.new_study_id(),
        owner_id=owner_id,
        spec={**spec.model_dump(mode="json"), "planned": [arm.to_json() for arm in arms]},
        metadata_=dict(metadata or {}),
    )
    session.add(study)
    session.flush()
    runs = [(arm, seed) for seed in spec.seeds for arm in arms if arm.like is None]
    create_jobs(session, study, runs, reuse_enabled=reuse_enabled)
    message = f"Created study {study.id}: {len(arms)} arms with {len(spec.seeds)} seeds, {len(runs)} jobs."
    append_event(session, study.id, "CREATED", message, {"arms": len(arms), "jobs": len(runs)})
    return get(session, owner_id=owner_id, study_id=study.id)


def _hold_files_of_tasks(session: Session, owner_id: str, spec: StudySpec) -> None:
    """Raises InvalidRequest by the names that the request has for them; jobs know them by others."""
    named = [
        (f"tasks[{index}].{field}", reference)
        for index, data in enumerate(spec.tasks or [])
        for field in FILES
        if (reference := getattr(data, field)) is not None and reference.startswith("file-")
    ]
    files.lock_for_job(session, owner_id=owner_id, references=named)


def create_jobs(
    session: Session,
    study: Study,
    runs: Sequence[tuple[PlannedArm, int]],
    *,
    first: int = 0,
    reuse_enabled: bool = True,
) -> list[str]:
    """Add a job for each arm and seed, in the places from `first` on; their ids. Raises InvalidRequest as jobs.create
    does. After the commit, hint each with "prepare".
    """
    specs = [(arm.name, arm.with_seed(seed)) for arm, seed in runs]
    new_jobs = [(spec, {"study": study.id, "arm": name}) for name, spec in specs]
    job_ids = jobs.create_all(session, owner_id=study.owner_id, jobs=new_jobs)
    for place, (job_id, (name, spec)) in enumerate(zip(job_ids, specs, strict=True), first):
        session.add(StudyJob(job_id=job_id, study_id=study.id, place=place, arm=name, seed=spec.seed))
        for length, key in enumerate(prefix_keys(study.id, spec) if reuse_enabled else [], 1):
            session.add(StudyPrefix(job_id=job_id, length=length, key=key, place=place))
    session.flush()
    return job_ids


def get(session: Session, *, owner_id: str, study_id: str) -> Study:
    """Raises NotFound, for another owner's study too."""
    study = session.scalar(select(Study).where(Study.id == study_id, Study.owner_id == owner_id))
    if study is None:
        raise NotFound(f"no study {study_id!r}", param="study_id", code="study_not_found")
    return study


def list_page(session: Session, *, owner_id: str, limit: int = 20, after: str | None = None) -> Page[Study]:
    """This owner's studies, newest first. Raises InvalidRequest (param `after`) for an unknown cursor."""
    place = select(Study.created_at, Study.id).where(Study.id == after, Study.owner_id == owner_id)
    return fetch_page(
        session,
        select(Study).where(Study.owner_id == owner_id),
        by=(Study.created_at, Study.id),
        cursor=cursor_of(session, place, after),
        limit=limit,
    )


def spec_of(study: Study) -> StudySpec:
    """What was asked for, without the arms that came of it."""
    values = {name: value for name, value in study.spec.items() if name != "planned"}
    if values.get("search") is not None:
        values["search"] = {name: value for name, value in values["search"].items() if name != "closed"}
    return StudySpec.model_validate(values)


def runs_of(session: Session, study_id: str, *, rows: bool = False) -> list[Run]:
    """All jobs of a study in its order, with what those that have succeeded left.

    Of jobs only id, state and model are read, and only with `rows` which rows each got right, which is much.
    """
    left = load_only(*([Outcome.outcomes] if rows else []), Outcome.costs, raiseload=True)
    query = (
        select(StudyJob, Job, Outcome, Outcome.outcomes["metric"].astext)
        .join(Job, Job.id == StudyJob.job_id)
        .outerjoin(Outcome, Outcome.job_id == StudyJob.job_id)
        .where(StudyJob.study_id == study_id)
        .options(load_only(Job.id, Job.state, Job.fine_tuned_model, raiseload=True), left)
        .order_by(StudyJob.place)
    )
    return [
        Run(arm=one.arm, seed=one.seed, job=job, outcome=left, metric=metric)
        for one, job, left, metric in session.execute(query)
    ]


def states_of(session: Session, study_ids: Sequence[str]) -> dict[str, list[JobState]]:
    """The states of each study's jobs."""
    query = select(StudyJob.study_id, Job.state).join(Job, Job.id == StudyJob.job_id)
    found: dict[str, list[JobState]] = {study_id: [] for study_id in study_ids}
    for study_id, state in session.execute(query.where(StudyJob.study_id.in_(study_ids))):
        found[study_id].append(JobState(state))
    return found


def status_of(study: Study, states: Sequence[JobState]) -> str:
    """What the states of its jobs come to. The end comes with the last verdict: whoever sees it finds all numbers.

    One failed arm fails no study: it has failed when no job at all has succeeded.
    """
    waiting = {JobState.VALIDATING_FILES, JobState.QUEUED}
    left = [state for state in states if state not in TERMINAL]
    if left:
        if all(state == JobState.PAUSED for state in left):
            return "paused"
        return "queued" if all(state in waiting for state in states) else "running"
    if study.finished_at is None:
        return "running"
    if study.cancel_requested_at is not None:
        return "cancelled"
    return "succeeded" if JobState.SUCCEEDED in states else "failed"


def is_trial(session: Session, job_id: str) -> bool:
    """Whether a search chooses by what comes of this job: of its baseline it does not."""
    planned = select(StudyJob.arm, Study.spec["planned"]).join(Study, StudyJob.study_id == Study.id)
    found = session.execute(planned.where(StudyJob.job_id == job_id)).one_or_none()
    return found is not None and any(arm["name"] == found[0] and arm.get("trial") for arm in found[1])


def request_cancel(session: Session, *, owner_id: str, study_id: str) -> Study:
    """Cancel every job that has not ended; asking again is fine. Raises NotFound; Conflict when the study has ended."""
    study = session.scalar(
        select(Study).where(Study.id == study_id, Study.owner_id == owner_id).with_for_update()
    )
    if study is None:
        return get(session, owner_id=owner_id, study_id=study_id)
    if study.finished_at is not None:
        raise Conflict("the study has already ended", code="study_ended")
    # Jobs that would have followed are not made any more.
    cancelled = any(arm.get("like") for arm in study.spec["planned"]) or study.spec.get("search") is not None
    for run in runs_of(session, study_id):
        with suppress(Conflict):  # it has ended by itself
            jobs.request_cancel(session, owner_id=owner_id, job_id=run.job.id)
            cancelled = True
    if not cancelled and study.cancel_requested_at is None:
        raise Conflict("every job of the study has ended; its verdict is on its way", code="study_ended")
    if study.cancel_requested_at is None:
        write(session, study_id, cancel_requested_at=func.now())
        append_event(session, study_id, "CANCELLING", "Cancelling every job that has not ended.")
    session.expire(study)
    return get(session, owner_id=owner_id, study_id=study_id)


def list_events(
    session: Session, *, owner_id: str, study_id: str, limit: int = 20, after: str | None = None
) -> Page[StudyEvent]:
    """A study's events, the latest first. Raises NotFound; InvalidRequest (param `after`) for an unknown cursor."""
    get(session, owner_id=owner_id, study_id=study_id)
    place = select(StudyEvent.seq).where(StudyEvent.study_id == study_id, StudyEvent.id == after)
    query = select(StudyEvent).where(StudyEvent.study_id == study_id)
    cursor = cursor_of(session, place, after)
    return fetch_page(session, query, by=(StudyEvent.seq,), cursor=cursor, limit=limit)
