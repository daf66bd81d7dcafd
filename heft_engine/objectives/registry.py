"""The objectives, by the `type` of a stage's `objective`. A new objective is added here."""

from __future__ import annotations

from heft_engine.config.train import ObjectiveSettings
from heft_engine.objectives.objective import Objective
from heft_engine.objectives.supervised import SupervisedObjective

OBJECTIVES: dict[str, type[Objective]] = {"supervised": SupervisedObjective}


def create(settings: ObjectiveSettings) -> Objective:
    """Returns the objective that a stage's settings name."""
    return OBJECTIVES[settings.type].create(settings)
