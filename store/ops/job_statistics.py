"""Statistics of the jobs of all owners: counts by state, waiting times, training speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from store.db.states import PURPOSES, JobState
from store.db.tables import Job
from store.jobs.shared_prefix import may_train


@dataclass(frozen=True, kw_only=True)
class JobStatistics:
    """Numbers for an operator."""

    by_state: Mapping[str, int]  #: of every state, also 0; without dry runs, which train nothing
    waiting_seconds: Mapping[str, float]  #: the oldest waiting job's age by state; 0 where none waits
    step_seconds: Mapping[str, float]  #: the mean over running jobs, by stage
    tokens_per_second: Mapping[str, float]  #: the sum over running jobs, by stage


def jobs(session: Session) -> JobStatistics:
    """Returns the statistics of all jobs."""
    is_job = ~Job.spec.has_key("dry_run")  # stored only where it is true
    counts = session.execute(select(Job.state, func.count()).where(is_job).group_by(Job.state)).all()
    by_state = {state.value: 0 for state in JobState} | {row.state: row[1] for row in counts}
    waiting = [state.value for state in PURPOSES]
    age = func.extract("epoch", func.now() - func.min(Job.created_at))
    ages = session.execute(
        select(Job.state, age)
        .where(Job.state.in_(waiting), or_(Job.lease_until.is_(None), Job.lease_until < func.now()))
        .where(or_(Job.not_before.is_(None), Job.not_before <= func.now()))
        .where(or_(Job.state != JobState.QUEUED, may_train()))  # others wait for a shared stage
        .group_by(Job.state)
    ).all()
    running = session.execute(
        select(Job.stage, Job.progress, Job.metrics).where(Job.state == JobState.RUNNING)
    ).all()
    steps: dict[str, list[float]] = defaultdict(list)
    tokens: dict[str, float] = defaultdict(float)
    for stage, progress, metrics in running:
        if (seconds := _step_seconds(progress)) is not None:
            steps[stage or "none"].append(seconds)
        if (rate := _tokens_per_second(metrics)) is not None:
            tokens[stage or "none"] += rate
    return JobStatistics(
        by_state=by_state,
        waiting_seconds=dict.fromkeys(waiting, 0.0)
        | {state: max(0.0, float(oldest)) for state, oldest in ages},
        step_seconds={stage: sum(values) / len(values) for stage, values in steps.items()},
        tokens_per_second=dict(tokens),
    )


def _step_seconds(progress: Mapping[str, Any]) -> float | None:
    """Returns the seconds a step from which the job's `eta_seconds` were computed."""
    steps_left, eta = progress.get("total_steps", 0) - progress.get("step", 0), progress.get("eta_seconds")
    return eta / steps_left if eta is not None and steps_left > 0 else None


def _tokens_per_second(metrics: Mapping[str, Any]) -> float | None:
    """Returns the speed of the stage that trained last."""
    stages: list[dict[str, Any]] = list(metrics.values())
    latest = max(stages, key=lambda stage: stage.get("step", 0), default={})
    tokens, seconds = latest.get("tokens"), latest.get("seconds")
    return tokens / seconds if tokens is not None and seconds else None
