"""The tables of studies, and of the per-row results of jobs that they compare."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from store.db.tables import Base, Count, CreatedAt, JsonObject


class Outcome(Base):
    """A job's per-row results after each of its stages, and the stages' costs. Written with the job's end."""

    __tablename__ = "outcomes"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    #: Of the engine's SUCCEEDED event; None: there were no rows to score.
    outcomes: Mapped[dict[str, Any] | None]
    costs: Mapped[list[Any]]  #: of the same event, one a stage


class Study(Base):
    """A study: several arms on the same data. Its status is derived from its jobs and from `finished_at`."""

    __tablename__ = "studies"

    id: Mapped[str] = mapped_column(primary_key=True)  #: study_…
    owner_id: Mapped[str]
    spec: Mapped[dict[str, Any]]  #: StudySpec as JSON, with the arms that were planned from it (`planned`)
    metadata_: Mapped[JsonObject] = mapped_column("metadata")
    created_at: Mapped[CreatedAt]
    finished_at: Mapped[datetime | None]  #: set with the last verdict
    cancel_requested_at: Mapped[datetime | None]
    event_seq: Mapped[Count]
    verdict: Mapped[dict[str, Any] | None]  #: heft_engine.studies.compare of the jobs that have ended

    __table_args__ = (
        Index("studies_by_owner", "owner_id", text("created_at DESC"), text("id DESC")),
        Index("studies_unfinished", "created_at", postgresql_where=text("finished_at IS NULL")),
    )


class StudyJob(Base):
    """A job of a study: one arm with one seed."""

    __tablename__ = "study_jobs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"))
    place: Mapped[int]  #: in the study's order
    arm: Mapped[str]
    seed: Mapped[int]
    reported_state: Mapped[str | None]  #: the final state that the study's events have reported

    __table_args__ = (UniqueConstraint("study_id", "place", name="study_jobs_in_order"),)


class StudyPrefix(Base):
    """The first `length` stages of a study's job, by a hash of their settings (store.jobs.shared_prefix)."""

    __tablename__ = "study_prefixes"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    length: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]
    place: Mapped[int]

    __table_args__ = (Index("study_prefixes_by_key", "key", "place"),)


class StudyEvent(Base):
    """An event of a study, numbered without gaps."""

    __tablename__ = "study_events"

    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)  #: studyevent_…
    created_at: Mapped[CreatedAt]
    level: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
