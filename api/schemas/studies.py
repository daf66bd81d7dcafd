"""Studies, as they are asked for and as they are shown."""

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
    """What `POST /v1/studies` takes. One of `arms`, `grid`, `search` and `preset` says what is compared."""

    metadata: Metadata = Field(default_factory=dict)
    #: Say what the study would take, and queue nothing.
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
    """One seed of an arm. `fine_tuned_model` can be asked like any other."""

    id: str
    seed: int
    status: str
    fine_tuned_model: str | None


class Arm(BaseModel):
    """A method and what came of it. The interval covers rows, and seeds where there are several (`interval_covers`).

    flops, seconds: of one run, the mean over its seeds, stages that were reused counted as when they were trained.
    """

    name: str
    method: dict[str, Any]
    #: With cross_task: which method it is, on which task.
    method_name: str | None = None
    task: str | None = None
    #: In a search: its number, its settings, what became of it (running, complete, failed; pruned: it can't be), and
    #: what it came to on the validation rows. Test rows are looked at for the best trial alone.
    trial: dict[str, Any] | None = None
    jobs: list[ArmJob]
    metric: str | None = None  #: what `accuracy` is the mean of
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
        mine = [run for run in runs if run.arm == planned["name"]]
        judged: list[dict[str, Any]] = verdict["arms"] if verdict else []
        shown = next((one for one in judged if one["name"] == planned["name"]), {})
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
                for run in mine
            ],
            metric=_metric(mine),
            **{name: value for name, value in shown.items() if name not in ("name", "seeds")},
            **_costs(mine),
        )


def _metric(runs: Sequence[Run]) -> str | None:
    return next((run.metric for run in runs if run.metric is not None), None)


def _costs(runs: Sequence[Run]) -> dict[str, Any]:
    """What one run of an arm takes."""
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
    """A study. Its numbers are those of the jobs that have ended so far; they are final with its status."""

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
    #: With cross_task: its tasks, and for each two methods what may be said over all of them.
    tasks: list[dict[str, Any]] | None = None
    over_tasks: list[dict[str, Any]] = Field(default_factory=list)
    #: What was searched, how many trials there are of which kind, and the best one so far.
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
    """A study in a list: without its arms."""

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
    """How many jobs are in which state."""
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
    """Something that happened to a study. `data.code` is stable."""

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
    """What a study would take, before any of it is run. null: nobody knows the base model's sizes."""

    object: Literal["study.estimate"] = "study.estimate"
    arms: list[dict[str, Any]]
    jobs: int
    flops: float | None
    memory_bytes: int | None
    host_memory_bytes: int | None
    disk_bytes: int | None
    assumptions: list[str]
