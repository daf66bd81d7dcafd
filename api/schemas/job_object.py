"""The fine-tuning job object: all fields of OpenAI's, and HEFT's added ones."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel

from api.schemas.common import Identified, seconds
from store.db.tables import Checkpoint, Event, Job
from store.jobs.spec import Hyperparameters, Supervised, TrainingSpec


class JobError(BaseModel):
    """The error of a failed job. The message says what to change."""

    code: str
    message: str
    param: str | None = None


class JobObject(Identified):
    """A job. `method` and `task` include all defaults, and resolved values for "auto" once the run has started."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    started_at: int | None
    estimated_finish: int | None
    organization_id: str
    model: str
    fine_tuned_model: str | None
    status: str
    error: JobError | None
    training_file: str
    validation_file: str | None
    test_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    suffix: str | None
    hyperparameters: Hyperparameters
    integrations: list[Any]
    metadata: dict[str, str]
    method: dict[str, Any]
    task: dict[str, Any]
    early_stopping: dict[str, Any] | None
    max_length: int | None
    dtype: str
    base_quantization: str | None
    reuse: bool
    n_checkpoints: int
    stage: str | None
    progress: dict[str, Any]
    metrics: dict[str, Any]
    validation: dict[str, Any] | None
    dry_run: bool
    estimate: dict[str, Any] | None  #: of a dry run that has succeeded
    evaluation: dict[str, Any] | None
    parity: dict[str, Any] | None

    @classmethod
    def of(cls, job: Job) -> Self:
        spec = TrainingSpec.model_validate(job.spec)
        resolved = job.resolved
        return cls(
            id=job.id,
            created_at=seconds(job.created_at),
            finished_at=seconds(job.finished_at),
            started_at=seconds(job.started_at),
            estimated_finish=_estimated_finish(job),
            organization_id=job.owner_id,
            model=spec.model,
            fine_tuned_model=job.fine_tuned_model,
            status=job.state,
            error=None if job.error is None else JobError.model_validate(job.error),
            training_file=spec.training_file,
            validation_file=spec.validation_file,
            test_file=spec.test_file,
            result_files=[job.result_file_id] if job.result_file_id else [],
            trained_tokens=job.trained_tokens,
            seed=spec.seed,
            suffix=spec.suffix,
            hyperparameters=_hyperparameters(spec),
            integrations=[item.model_dump(exclude_none=True) for item in spec.integrations],
            metadata=job.metadata_,
            method=_method(spec, resolved.get("stages", [])),
            task=spec.task.model_dump() | resolved.get("task", {}),
            early_stopping=None if spec.early_stopping is None else spec.early_stopping.model_dump(),
            max_length=resolved.get("max_length", spec.max_length),
            dtype=resolved.get("dtype", spec.dtype),
            base_quantization=resolved.get("base_quantization", spec.base_quantization),
            reuse=spec.reuse,
            n_checkpoints=spec.n_checkpoints,
            stage=job.stage,
            progress=job.progress,
            metrics=job.metrics,
            validation=job.validation,
            dry_run=spec.dry_run,
            estimate=(job.validation or {}).get("estimate"),
            evaluation=job.evaluation,
            parity=job.parity,
        )


def _estimated_finish(job: Job) -> int | None:
    eta_seconds, updated_at = job.progress.get("eta_seconds"), job.progress.get("updated_at")
    if job.finished_at is not None or eta_seconds is None or updated_at is None:
        return None
    return int(updated_at + eta_seconds)


def _hyperparameters(spec: TrainingSpec) -> Hyperparameters:
    """OpenAI's hyperparameters, with the values of the first stage."""
    first = spec.stages()[0]
    return Hyperparameters(
        n_epochs=first.n_epochs,
        batch_size=first.batch_size,
        learning_rate_multiplier=first.learning_rate_multiplier,
    )


def _method(spec: TrainingSpec, resolved: list[dict[str, Any]]) -> dict[str, Any]:
    """The method with its settings under its name; `supervised` has those of `heft` too."""
    stages = [stage.model_dump(mode="json") for stage in spec.stages()]
    for stage, values in zip(stages, resolved, strict=False):  # empty before the run has started
        stage |= {name: value for name, value in values.items() if name in stage}
    kind = spec.method.type
    if kind == "recipe":
        return {"type": kind, "recipe": {"stages": stages}}
    settings: dict[str, dict[str, Any]] = {}
    for stage in stages:
        settings.setdefault(stage.pop("type"), stage)
    if kind in ("lora", "reft"):
        return {"type": kind, kind: settings[kind]}
    if kind == "supervised":
        supervised = (spec.method.supervised or Supervised()).model_dump()
        return {"type": kind, "supervised": supervised, "heft": settings}
    return {"type": kind, kind: settings}


class EventObject(Identified):
    """An event of a job. `data.code` is stable; `data.stage` and `data.stage_index` identify the stage."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(
            id=event.id,
            created_at=seconds(event.created_at),
            level=event.level,
            type=event.type,
            message=event.message,
            data=event.data,
        )


class CheckpointObject(Identified):
    """The model at the end of a stage or an epoch; `fine_tuned_model_checkpoint` is its model id.

    `best`: of the job's checkpoints, this one is the best on the validation rows (store.jobs.checkpoints.best).
    """

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    stage: str
    stage_index: int
    metrics: dict[str, Any]
    best: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, best_id: str | None) -> Self:
        assert checkpoint.model_id is not None
        return cls(
            id=checkpoint.id,
            created_at=seconds(checkpoint.created_at),
            fine_tuned_model_checkpoint=checkpoint.model_id,
            fine_tuning_job_id=checkpoint.job_id,
            step_number=checkpoint.step,
            stage=checkpoint.stage,
            stage_index=checkpoint.stage_index,
            metrics={"step": checkpoint.step, **checkpoint.metrics},
            best=checkpoint.id == best_id,
        )
