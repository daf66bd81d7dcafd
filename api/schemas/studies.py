"""Requests and objects of studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from api.schemas.common import Identified, RequestBody, seconds
from api.schemas.jobs import Metadata
from store.db.states import JobState
from store.db.study_tables import Study, StudyEvent
from store.studies.search_rounds import summary
from store.studies.spec import StudySpec
from store.studies.studies import Run, status_of


class StudyRequest(RequestBody, StudySpec):
    """The body of `POST /v1/studies`. One of `arms`, `grid`, `search` and `preset` defines the arms."""

    metadata: Metadata = Field(default_factory=dict)
    #: Returns an estimate of the study's costs and queues nothing.
    dry_run: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    def spec(self) -> StudySpec:
        return StudySpec(**{name: getattr(self, name) for name in StudySpec.model_fields})

    def as_sent(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class ArmJob(BaseModel):
    """The job of one seed of an arm."""

    id: str
    seed: int
    status: str
    fine_tuned_model: str | None


class Arm(BaseModel):
    """A method and its results. The interval covers rows, and seeds if there are several (`interval_covers`).

    flops, seconds: mean over the seeds; a reused stage counts with the costs of its training.
    """

    name: str
    method: dict[str, Any]
    #: With cross_task: the name of the method, and its task.
    method_name: str | None = None
    task: str | None = None
    #: In a search: its number, its settings, its state (running, complete, failed, or pruned if the settings are not
    #: valid), and its value on the validation rows. Only the best trial is evaluated on the test rows.
    trial: dict[str, Any] | None = None
    jobs: list[ArmJob]
    metric: str | None = None  #: the metric whose mean is `accuracy`
    accuracy: float | None = None
    interval_95: list[float] | None = None
    interval_covers: str | None = None
    interval_over_seeds_95: list[float] | None = None
    seed_deviation: float | None = None
    per_seed: list[dict[str, Any]] = Field(default_factory=list)
    missing_seeds: list[int] = Field(default_factory=list)
    flops: float | None = None
    seconds: float | None = None
    trained_parameters: int | None = None

    @classmethod
    def of(cls, planned: Mapping[str, Any], runs: Sequence[Run], verdict: Mapping[str, Any] | None) -> Self:
        arm_runs = [run for run in runs if run.arm == planned["name"]]
        compared: list[dict[str, Any]] = verdict["arms"] if verdict else []
        statistics = next((arm for arm in compared if arm["name"] == planned["name"]), {})
        return cls(
            name=planned["name"],
            method=planned["method"],
            method_name=planned.get("method_name"),
            task=planned.get("task"),
            trial=planned.get("trial"),
            jobs=[
                ArmJob(
                    id=run.job.id,
                    seed=run.seed,
                    status=run.job.state,
                    fine_tuned_model=run.job.fine_tuned_model,
                )
                for run in arm_runs
            ],
            metric=_metric(arm_runs),
            **{name: value for name, value in statistics.items() if name not in ("name", "seeds")},
            **_costs(arm_runs),
        )


def _metric(runs: Sequence[Run]) -> str | None:
    return next((run.metric for run in runs if run.metric is not None), None)


def _costs(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean costs of a run of the arm."""
    known = [run.outcome.costs for run in runs if run.outcome is not None and run.outcome.costs]
    if not known:
        return {}

    def mean(name: str) -> float:
        return float(sum(stage[name] for costs in known for stage in costs) / len(known))

    return {
        "flops": mean("flops"),
        "seconds": round(mean("seconds"), 3),
        "trained_parameters": round(mean("trained_parameters")),
    }


class StudyObject(Identified):
    """A study. Its numbers cover the jobs that have ended so far, and are final when the study has ended."""

    object: Literal["study"] = "study"
    name: str
    status: str
    created_at: int
    finished_at: int | None
    model: str
    training_file: str | None
    validation_file: str | None
    test_file: str | None
    seeds: list[int]
    preset: str | None
    baseline: str | None
    metadata: dict[str, str]
    jobs: dict[str, int]
    arms: list[Arm]
    comparisons: list[dict[str, Any]]
    #: With cross_task: its tasks, and comparisons of methods over all tasks.
    tasks: list[dict[str, Any]] | None = None
    over_tasks: list[dict[str, Any]] = Field(default_factory=list)
    #: In a search: its settings, the numbers of trials by state, and the best trial so far.
    search: dict[str, Any] | None = None

    @classmethod
    def of(cls, study: Study, runs: Sequence[Run]) -> Self:
        states = [JobState(run.job.state) for run in runs]
        verdict = study.verdict
        return cls(
            status=status_of(study, states),
            jobs=counted(states),
            arms=[Arm.of(planned, runs, verdict) for planned in study.spec["planned"]],
            comparisons=verdict["comparisons"] if verdict else [],
            over_tasks=verdict.get("over_tasks", []) if verdict else [],
            tasks=study.spec.get("tasks"),
            search=summary(study) if study.spec.get("search") is not None else None,
            **_shared(study),
        )


class StudySummary(Identified):
    """A study in a list, without its arms."""

    object: Literal["study"] = "study"
    name: str
    status: str
    created_at: int
    finished_at: int | None
    model: str
    training_file: str | None
    validation_file: str | None
    test_file: str | None
    seeds: list[int]
    preset: str | None
    baseline: str | None
    metadata: dict[str, str]
    jobs: dict[str, int]

    @classmethod
    def of(cls, study: Study, states: Sequence[JobState]) -> Self:
        return cls(status=status_of(study, states), jobs=counted(states), **_shared(study))


def counted(states: Sequence[JobState]) -> dict[str, int]:
    """Returns the number of jobs in each state."""
    return {str(state): states.count(state) for state in JobState if state in states}


def _shared(study: Study) -> dict[str, Any]:
    names = ("name", "model", "training_file", "validation_file", "test_file", "seeds", "preset", "baseline")
    return {
        "id": study.id,
        "created_at": seconds(study.created_at),
        "finished_at": seconds(study.finished_at),
        "metadata": study.metadata_,
        **{name: study.spec[name] for name in names},
    }


class StudyEventObject(Identified):
    """An event of a study. `data.code` is stable."""

    object: Literal["study.event"] = "study.event"
    created_at: int
    level: str
    message: str
    data: dict[str, Any]

    @classmethod
    def of(cls, event: StudyEvent) -> Self:
        return cls(
            id=event.id,
            created_at=seconds(event.created_at),
            level=event.level,
            message=event.message,
            data=event.data,
        )


class Estimate(BaseModel):
    """The estimated costs of a study. null: the base model's sizes are not known yet."""

    object: Literal["study.estimate"] = "study.estimate"
    arms: list[dict[str, Any]]
    jobs: int
    flops: float | None
    memory_bytes: int | None
    host_memory_bytes: int | None
    disk_bytes: int | None
    assumptions: list[str]
