"""Studies looked after: when jobs of one have ended, the verdict over its arms is made anew and written down, and what
follows is made: the next trials of a search, arms of equal arithmetic.

A chore of the workers that check files. It does NOT know statistics, nor how a search chooses: children of the engine
do (worker.engine_process.query).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from store.db.session import transaction
from store.db.study_tables import Study
from store.errors import Unavailable
from store.studies import search_rounds, studies, verdicts
from store.studies.arms import BaseModelInfo
from store.studies.search import Proposal
from store.studies.studies import Run
from worker.chores.chore import Chore
from worker.chores.searching import Ask, next_proposal
from worker.context import ENGINE, Context
from worker.engine_process.query import ask

log = logging.getLogger(__name__)

EMPTY_VERDICT: dict[str, Any] = {"arms": [], "comparisons": [], "over_tasks": []}


def update_studies(context: Context, command: Sequence[str] = ENGINE) -> None:
    """Judge every study with news. Raises Unavailable."""
    failed: set[str] = set()
    while not context.stopping.is_set() and _judge_one(context, command, failed):
        pass


def _judge_one(context: Context, command: Sequence[str], failed: set[str]) -> bool:
    """False when there is nothing (more) to judge just now. No transaction is open while it is computed.

    A study that can't be judged joins `failed`, so that it does not stand before the others.
    """
    with transaction(context.sessions) as session:
        study = verdicts.next_study(session, exclude=failed)
        runs = studies.runs_of(session, study.id, rows=True) if study is not None else []
        base = studies.base_model_info(session, study.spec["model"]) if study is not None else None
    if study is None:
        return False
    try:
        verdict, proposal = _looked_at(partial(ask, context, command), study, runs, base)
        reuse_enabled = context.settings.reuse_enabled
        with transaction(context.sessions) as session:
            made = verdicts.record(session, study.id, runs, verdict, proposal, reuse_enabled=reuse_enabled)
    except Unavailable:
        raise
    except Exception as fault:
        # Whatever it is, it is this study's: nothing was written down, and the next sweep tries again.
        said = getattr(fault, "stderr", None) or b""
        log.exception("study %s could not be judged: %s", study.id, said[-500:].decode(errors="replace"))
        failed.add(study.id)
        return True
    for job_id in made or ():
        context.hints.hint(job_id, "prepare")
    return True


def _looked_at(
    engine: Ask, study: Study, runs: Sequence[Run], base: BaseModelInfo | None
) -> tuple[dict[str, Any], Proposal | None]:
    """The verdict, and what a search tries next."""
    if study.spec.get("search") is None:
        return engine("compare", verdicts.compare_input(study, runs)), None
    planned = search_rounds.arms_with_results(study, runs)
    proposal = next_proposal(engine, study, planned, base)
    arms = verdicts.arms_to_compare([*planned, *proposal.new_arms])
    if not arms:
        return EMPTY_VERDICT, proposal
    return engine("compare", verdicts.compare_input(study, runs, arms)), proposal


def judging(context: Context) -> list[Chore]:
    seconds = context.settings.sweep_seconds
    return [Chore(name="judge studies", seconds=seconds, do=lambda: update_studies(context))]
