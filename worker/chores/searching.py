"""What a search tries next: its trials so far are put before optuna, in a child, and its answer is looked through.

Asked anew each time from what the database has, so a restart changes nothing. It does NOT make jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from store.db.study_tables import Study
from store.studies.arms import BaseModelInfo, Trial
from store.studies.search import Proposal, free_slots, trial_json, trials_of
from store.studies.studies import spec_of

Ask = Callable[[str, Mapping[str, Any]], dict[str, Any]]


def next_proposal(
    ask: Ask, study: Study, planned: list[dict[str, Any]], base: BaseModelInfo | None
) -> Proposal:
    """`planned`: the study's arms with what came of their trials. Points that can't be are kept, and others asked for.

    Raises what `ask` raises.
    """
    spec, new = spec_of(study), list[dict[str, Any]]()
    if study.cancel_requested_at is not None:
        return Proposal(known_arms=len(planned), new_arms=())
    while (places := free_slots(study.spec["search"], trials := trials_of([*planned, *new]))) > 0:
        points = ask("suggest", _question(study, trials, places))["points"]
        if not points:  # every point of the space has been tried
            break
        numbered = enumerate(points, len(trials) + 1)
        new += [trial_json(spec, Trial(number=number, params=params), base) for number, params in numbered]
    return Proposal(known_arms=len(planned), new_arms=new)


def _question(study: Study, trials: list[Trial], count: int) -> dict[str, Any]:
    search = study.spec["search"]
    return {
        "space": search["space"],
        "budget": search["budget"],
        "sampler": search["sampler"],
        "seed": study.spec["seeds"][0],
        "trials": [{"point": trial.params, "state": trial.state, "value": trial.value} for trial in trials],
        "count": count,
    }
