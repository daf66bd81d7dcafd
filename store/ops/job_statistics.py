"""The service in numbers, for its operator: jobs by state, how long they wait, how fast those that run are.

Of all owners together, and naming none. It does NOT know Prometheus.
"""

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
    """by_state: every state, 0 included. waiting_seconds: age of the oldest job that waits, by state; 0 where none
    does. step_seconds: mean over the running jobs, and tokens_per_second: their sum, by the stage they are in.
    """

    by_state: Mapping[str, int]
    waiting_seconds: Mapping[str, float]
    step_seconds: Mapping[str, float]
    tokens_per_second: Mapping[str, float]


def jobs(session: Session) -> JobStatistics:
    counts = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
    by_state = {state.value: 0 for state in JobState} | {row.state: row[1] for row in counts}
    waiting = [state.value for state in PURPOSES]
    age = func.extract("epoch", func.now() - func.min(Job.created_at))
    ages = session.execute(
        select(Job.state, age)
        .where(Job.state.in_(waiting), or_(Job.lease_until.is_(None), Job.lease_until < func.now()))
        .where(or_(Job.not_before.is_(None), Job.not_before <= func.now()))
        .where(or_(Job.state != JobState.QUEUED, may_train()))  # others wait for a stage that they share
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
        waiting_seconds=dict.fromkeys(waiting, 0.0) | {state: max(0.0, float(old)) for state, old in ages},
        step_seconds={stage: sum(found) / len(found) for stage, found in steps.items()},
        tokens_per_second=dict(tokens),
    )


def _step_seconds(progress: Mapping[str, Any]) -> float | None:
    """The pace by which a job's remaining time was reckoned."""
    left, eta = progress.get("total_steps", 0) - progress.get("step", 0), progress.get("eta_seconds")
    return eta / left if eta is not None and left > 0 else None


def _tokens_per_second(metrics: Mapping[str, Any]) -> float | None:
    """Of the stage that trained last."""
    stages: list[dict[str, Any]] = list(metrics.values())
    latest = max(stages, key=lambda stage: stage.get("step", 0), default={})
    tokens, seconds = latest.get("tokens"), latest.get("seconds")
    return tokens / seconds if tokens is not None and seconds else None
