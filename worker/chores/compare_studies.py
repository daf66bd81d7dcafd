"""Compares the arms of a study when jobs of it have ended, and suggests the next trials of a search.

A chore of the workers that check files. Statistics and optuna run in child processes of the engine. What a search has
tried is read from the database each time, so a restart changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from store.db.session import transaction
from store.db.study_tables import Study
from store.errors import Unavailable
from store.studies import search_rounds, studies, verdicts
from store.studies.arms import BaseModelInfo, Trial
from store.studies.search import Proposal, free_slots, trial_json, trials_of
from store.studies.studies import Run, spec_of
from worker.chores.chore import Chore
from worker.context import Context
from worker.engine_process.query import query_engine

log = logging.getLogger(__name__)

#: The verdict of a search while none of its arms may be compared yet.
EMPTY_VERDICT: dict[str, Any] = {"arms": [], "comparisons": [], "over_tasks": []}


def study_chore(context: Context) -> Chore:
    seconds = context.settings.sweep_seconds
    return Chore(name="compare studies", seconds=seconds, run=lambda: update_studies(context))


def update_studies(context: Context) -> None:
    """Updates every study of which jobs have ended since its last verdict. Raises Unavailable."""
    failed: set[str] = set()
    while not context.stopping.is_set() and _update_next(context, failed):
        pass


def _update_next(context: Context, failed: set[str]) -> bool:
    """Updates the oldest study with news, or adds it to `failed` so that others get their turn.

    Returns False when there is none. No transaction is open while the engine computes.
    """
    with transaction(context.sessions) as session:
        study = verdicts.next_study(session, exclude=failed)
        if study is None:
            return False
        runs = studies.runs_of(session, study.id, rows=True)
        base = studies.base_model_info(session, study.spec["model"])
    try:
        new_job_ids = _update(context, study, runs, base)
    except Unavailable:
        raise
    except Exception as error:
        # Nothing was written: the next turn of the chore tries this study again.
        stderr: bytes = getattr(error, "stderr", None) or b""
        log.exception("study %s: no verdict: %s", study.id, stderr[-500:].decode(errors="replace"))
        failed.add(study.id)
        return True
    for job_id in new_job_ids:
        context.hints.hint(job_id, "prepare")
    return True


def _update(context: Context, study: Study, runs: Sequence[Run], base: BaseModelInfo | None) -> list[str]:
    """Writes the verdict over these runs and creates the jobs that follow; returns their ids."""
    proposal, arms = None, None
    if study.spec.get("search") is not None:
        planned = search_rounds.arms_with_results(study, runs)
        proposal = _suggest(context, study, planned, base)
        arms = verdicts.arms_to_compare([*planned, *proposal.new_arms])
    verdict = EMPTY_VERDICT
    if arms is None or arms:
        verdict = query_engine(context, "compare", verdicts.compare_input(study, runs, arms))
    reuse_enabled = context.settings.reuse_enabled
    with transaction(context.sessions) as session:
        job_ids = verdicts.record(session, study.id, runs, verdict, proposal, reuse_enabled=reuse_enabled)
    return job_ids or []


def _suggest(
    context: Context, study: Study, planned: list[dict[str, Any]], base: BaseModelInfo | None
) -> Proposal:
    """Returns the trials that a search tries next. `planned`: its arms, with the results of their trials so far.

    Suggestions that are no valid settings become pruned arms, and others take their places.
    """
    new_arms: list[dict[str, Any]] = []
    if study.cancel_requested_at is None:
        spec = spec_of(study)
        trials = trials_of(planned)
        while (count := free_slots(study.spec["search"], trials)) > 0:
            points = query_engine(context, "suggest", _search_so_far(study, trials, count))["points"]
            if not points:  # every point of the space has been tried
                break
            for number, params in enumerate(points, len(trials) + 1):
                new_arms.append(trial_json(spec, Trial(number=number, params=params), base))
            trials = trials_of([*planned, *new_arms])
    return Proposal(known_arms=len(planned), new_arms=new_arms)


def _search_so_far(study: Study, trials: list[Trial], count: int) -> dict[str, Any]:
    """Returns the question of `heft_engine suggest`."""
    search = study.spec["search"]
    return {
        "space": search["space"],
        "budget": search["budget"],
        "sampler": search["sampler"],
        "seed": study.spec["seeds"][0],
        "trials": [{"point": trial.params, "state": trial.state, "value": trial.value} for trial in trials],
        "count": count,
    }
