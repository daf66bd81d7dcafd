"""The estimate of a job that is not trained: rows, tokens, steps, memory and time, from its checked files.

The engine plans the stages for a training worker's machine. Seconds come from what workers here have measured: the
operations a second of earlier jobs' stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from store.db.study_tables import Outcome
from store.db.tables import FineTunedModel, Job
from store.jobs.spec import TrainingSpec

#: Jobs whose stages say how fast workers are: the newest.
_MEASURED_JOBS = 20


def estimate(
    session: Session,
    spec: TrainingSpec,
    report: Mapping[str, Any],
    plan: Sequence[Mapping[str, Any]] | None,
    machine: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns what a job would take. `report`: on its files; `plan`: of each stage, None without a machine."""
    training = report["files"]["training_file"]
    epochs = sum(stage.n_epochs for stage in spec.stages())
    steps = sum(stage.n_epochs * -(-training["examples"] // stage.batch_size) for stage in spec.stages())
    rates, measured_jobs = _flops_per_second(session, spec.base_model)
    stages = None if plan is None else [_stage(stage, rates) for stage in plan]
    seconds = [stage["seconds"] for stage in stages or [{"seconds": None}]]
    return {
        "object": "fine_tuning.job.estimate",
        "rows": training["rows"],
        "examples": training["examples"],
        "truncated_rows": training["truncated"],
        "longest_example_tokens": training["longest"],
        "tokens": training["tokens"],
        "trained_tokens": epochs * training["tokens"],
        "steps": steps,
        "fits": None if stages is None else all(stage["fits"] for stage in stages),
        "seconds": None if None in seconds else round(sum(seconds), 1),
        "measured_jobs": measured_jobs,
        "machine": None if machine is None else dict(machine),
        "stages": stages,
    }


def _stage(planned: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    rate, flops = rates.get(planned["type"]), planned.get("flops")
    seconds = None if rate is None or flops is None else round(flops / rate, 1)
    return {**planned, "seconds": seconds}


def _flops_per_second(session: Session, base_model: str) -> tuple[dict[str, float], int]:
    """Returns the measured rate of each type of stage, and the number of jobs that it is from.

    Jobs on the same base, if there are any: small models reach a smaller share of a machine's rate.
    """
    newest = (
        select(Outcome.costs)
        .select_from(Job)
        .join(Outcome, Outcome.job_id == Job.id)
        .join(FineTunedModel, FineTunedModel.id == Job.fine_tuned_model)
        .order_by(Job.finished_at.desc())
        .limit(_MEASURED_JOBS)
    )
    measured = _own_costs(session, newest.where(FineTunedModel.base_model == base_model))
    measured = measured or _own_costs(session, newest)
    flops: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for costs in measured:
        for cost in costs:
            flops[cost["stage"]] += cost["flops"]
            seconds[cost["stage"]] += cost["seconds"]
    rates = {stage: flops[stage] / seconds[stage] for stage in flops if flops[stage] and seconds[stage]}
    return rates, len(measured)


def _own_costs(session: Session, query: Select[tuple[list[Any]]]) -> list[list[dict[str, Any]]]:
    """Returns the costs of the stages that each job has trained itself, of jobs that have any."""
    by_job = [[cost for cost in costs if not cost.get("reused")] for costs in session.scalars(query)]
    return [costs for costs in by_job if costs]
