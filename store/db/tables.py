"""The tables of jobs, files, models and workers. `migrations/` creates them; a test compares the two."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    String,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from store.db.states import JobState
from store.db.storable import StorableText


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {
        dict[str, Any]: JSONB(none_as_null=True),
        list[Any]: JSONB(none_as_null=True),
        datetime: DateTime(timezone=True),
        str: StorableText,
        int: BigInteger,
    }


CreatedAt = Annotated[datetime, mapped_column(server_default=func.now())]
Count = Annotated[int, mapped_column(server_default=text("0"))]
JsonObject = Annotated[dict[str, Any], mapped_column(server_default=text("'{}'::jsonb"))]


class ApiKey(Base):
    """An API key of an owner. Only the SHA-256 of its secret is stored."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)  #: the public half of heft_<id>_<secret>
    owner_id: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    secret_hash: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[CreatedAt]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class File(Base):
    """An uploaded file, or a result file of a job."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)  #: file-…
    owner_id: Mapped[str]
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str]
    storage_key: Mapped[str]
    created_at: Mapped[CreatedAt]
    deleted_at: Mapped[datetime | None]  #: hidden from its owner since then
    purged_at: Mapped[datetime | None]  #: its bytes were deleted then

    __table_args__ = (Index("files_by_owner", "owner_id", text("created_at DESC"), text("id DESC")),)


class Job(Base):
    """A fine-tuning job. Every change is a guarded UPDATE (store.jobs.transitions)."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)  #: ftjob-…
    owner_id: Mapped[str]
    state: Mapped[str] = mapped_column(String(20))
    spec: Mapped[dict[str, Any]]  #: TrainingSpec as JSON
    metadata_: Mapped[JsonObject] = mapped_column("metadata")
    created_at: Mapped[CreatedAt]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    # The attempt and its lease.
    attempt: Mapped[Count]  #: the fencing token
    worker_id: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    hinted_at: Mapped[datetime | None]  #: when a message was last sent for it
    not_before: Mapped[datetime | None]  #: the end of the pause after a crash of its trainer
    trainer_deaths: Mapped[Count]  #: crashes since the last checkpoint
    lost_leases: Mapped[Count]
    paused_from: Mapped[str | None]  #: the state that resume goes back to
    #: Stages whose results other jobs can reuse.
    stages_passed: Mapped[Count]

    # Requests of its user.
    cancel_requested_at: Mapped[datetime | None]
    pause_requested_at: Mapped[datetime | None]

    # Progress and results.
    event_seq: Mapped[Count]  #: the number of its last event
    stage: Mapped[str | None]
    progress: Mapped[JsonObject]
    metrics: Mapped[JsonObject]  #: {stage: its latest metrics}
    resolved: Mapped[JsonObject]  #: "auto" settings as the engine resolved them
    validation: Mapped[dict[str, Any] | None]  #: the report on its files
    evaluation: Mapped[dict[str, Any] | None]
    parity: Mapped[dict[str, Any] | None]
    trained_tokens: Mapped[int | None]
    error: Mapped[dict[str, Any] | None]  #: {code, message, param}
    cleanup_error: Mapped[str | None]  #: an error after the end, which does not change the end
    result_file_id: Mapped[str | None]
    fine_tuned_model: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(
            "state IN (" + ", ".join(f"'{state}'" for state in JobState) + ")", name="jobs_state"
        ),
        Index("jobs_by_owner", "owner_id", text("created_at DESC"), text("id DESC")),
        Index("jobs_unfinished", "state", "lease_until", postgresql_where=text("finished_at IS NULL")),
        Index("jobs_by_metadata", "metadata", postgresql_using="gin"),
    )


class Attempt(Base):
    """One claim of a job by a worker, and how it ended."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str]
    purpose: Mapped[str]  #: prepare or train
    started_at: Mapped[CreatedAt]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]  #: an AttemptOutcome
    swept_at: Mapped[datetime | None]  #: when the bytes that it stored and no row names were deleted


class Group(Base):
    """Workers that train one job together, in one attempt. Its worker is machine 0."""

    __tablename__ = "groups"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    nodes: Mapped[int]  #: machines, that of the claim included
    processes: Mapped[int]  #: of each machine
    rendezvous: Mapped[str]  #: host:port of machine 0, where the processes meet
    opened_at: Mapped[CreatedAt]
    started_at: Mapped[datetime | None]  #: when all members were ready; nobody joins afterwards
    #: By which the processes admit each other; None: the group has started, or is of an older version.
    secret: Mapped[str | None]


class GroupMember(Base):
    """The place of another worker in a group."""

    __tablename__ = "group_members"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    node_rank: Mapped[int] = mapped_column(primary_key=True)  #: from 1
    worker_id: Mapped[str]
    joined_at: Mapped[CreatedAt]
    lease_until: Mapped[datetime]
    error: Mapped[dict[str, Any] | None]  #: {code, message, param}, that its processes have failed with
    ready_at: Mapped[datetime | None]  #: when it had the rows

    __table_args__ = (ForeignKeyConstraint(["job_id", "attempt"], ["groups.job_id", "groups.attempt"]),)


class Event(Base):
    """An event of a job, numbered without gaps by UPDATE … RETURNING on the job's row."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)  #: ftevent-…
    attempt: Mapped[int]
    created_at: Mapped[CreatedAt]
    level: Mapped[str]
    type: Mapped[str]  #: message or metrics
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


class Checkpoint(Base):
    """A checkpoint that is committed: its files were durable before this row was written."""

    __tablename__ = "checkpoints"

    id: Mapped[str] = mapped_column(primary_key=True)  #: ftckpt-…
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    attempt: Mapped[int]
    step: Mapped[int]  #: optimizer steps of the whole run
    stage: Mapped[str]
    stage_index: Mapped[int]
    kind: Mapped[str]  #: step (to resume from), epoch (a model), stage (the end of a stage: both)
    storage_key: Mapped[str]
    manifest: Mapped[dict[str, Any]]  #: {file: sha256}
    metrics: Mapped[dict[str, Any]]  #: train_loss, valid_loss, … by OpenAI's names
    model_id: Mapped[str | None]
    created_at: Mapped[CreatedAt]
    removed_at: Mapped[datetime | None]  #: not to be resumed from since then
    purged_at: Mapped[datetime | None]  #: its bytes were deleted then

    __table_args__ = (UniqueConstraint("job_id", "attempt", "step", "kind", name="checkpoints_once"),)


class BaseModelRow(Base):
    """A base model that a worker offers. The API knows base models from these rows alone."""

    __tablename__ = "base_models"

    id: Mapped[str] = mapped_column(primary_key=True)  #: smollm2-135m, a folder's name, org/name
    source: Mapped[str]  #: alias, directory or hub
    revision: Mapped[str | None]  #: a commit on the hub
    info: Mapped[dict[str, Any]]  #: model_type, n_layers, hidden_size, parameters
    created_at: Mapped[CreatedAt]
    seen_at: Mapped[CreatedAt]


class FineTunedModel(Base):
    """A model that a job trained: its result (`final`, at most one a job) or a checkpoint's."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True)  #: ft:<base>:<owner>:<suffix>:<short id>[:ckpt-…]
    owner_id: Mapped[str] = mapped_column(index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    kind: Mapped[str]  #: final or checkpoint
    base_model: Mapped[str]
    started_from: Mapped[str | None]  #: the fine-tuned model that its job went on from, which may be deleted
    storage_key: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    task: Mapped[dict[str, Any]]
    created_at: Mapped[CreatedAt]
    deleted_at: Mapped[datetime | None]
    purged_at: Mapped[datetime | None]

    __table_args__ = (
        Index("models_one_success", "job_id", unique=True, postgresql_where=text("kind = 'final'")),
    )


class StageResult(Base):
    """The result of a stage, which later jobs of the same owner can reuse (store.jobs.stage_results)."""

    __tablename__ = "stage_results"

    storage_key: Mapped[str] = mapped_column(primary_key=True)
    owner_id: Mapped[str]
    key: Mapped[str]  #: SHA-256 of all its inputs (heft_engine.training.stage_cache)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)  #: the job that stored it
    manifest: Mapped[dict[str, Any]]  #: {file: sha256}
    bytes: Mapped[int]
    created_at: Mapped[CreatedAt]
    last_used_at: Mapped[CreatedAt]
    removed_at: Mapped[datetime | None]  #: not reused since then; the row is deleted after its bytes

    __table_args__ = (Index("stage_results_by_key", "owner_id", "key"),)


class Export(Base):
    """An archive of a model in one format, built by a worker at the first request."""

    __tablename__ = "exports"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    format: Mapped[str] = mapped_column(primary_key=True)  #: bundle, merged, peft, pyreft; diagnostics
    state: Mapped[str]  #: an ExportState
    attempt: Mapped[Count]  #: the fencing token
    losses: Mapped[Count]  #: workers that were lost while they built it
    lease_until: Mapped[datetime | None]
    storage_key: Mapped[str | None]
    bytes: Mapped[int | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[CreatedAt]
    failed_at: Mapped[datetime | None]


class Reconciler(Base):
    """One row: the time of the last sweep, and the time from which expired leases are taken back (after an outage)."""

    __tablename__ = "reconciler"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    swept_at: Mapped[datetime]
    takeover_after: Mapped[datetime]


class Worker(Base):
    """A running worker process."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]  #: train or inference
    info: Mapped[
        dict[str, Any]
    ]  #: host, pid, version, device; gpu_requested, gpu_claimed_bytes and gpu_released_to
    started_at: Mapped[CreatedAt]
    seen_at: Mapped[CreatedAt]  #: its last heartbeat


class IdempotencyKey(Base):
    """The Idempotency-Key of a POST, and the resource that it created."""

    __tablename__ = "idempotency_keys"

    owner_id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_hash: Mapped[str]
    resource_id: Mapped[str]
    created_at: Mapped[CreatedAt] = mapped_column(index=True)
