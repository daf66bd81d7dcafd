"""One arm of a study: what its jobs will be, or why it can't be. It does NOT know where arms come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import ValidationError

from store.errors import InvalidRequest
from store.jobs.spec import TrainingSpec, check_known_datasets
from store.studies.dotted_settings import JOB_SETTINGS, Where
from store.studies.spec import FILES, StudySpec

TrialState = Literal["running", "complete", "failed", "pruned"]


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """What a worker has said of the base model."""

    n_layers: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An arm as its search sees it. value: of a complete one, the mean over its seeds on the validation rows.

    reason: why it has failed, or can't be (`pruned`: it has no jobs).
    """

    number: int
    params: dict[str, Any]
    state: TrialState = "running"
    value: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    name: str
    spec: TrainingSpec  #: with the first seed
    #: The arm whose arithmetic it shall take; its epochs are chosen, and its jobs made, when that is known.
    like: str | None = None
    #: Where several methods are run on several tasks: which on which.
    method_name: str | None = None
    task: str | None = None
    trial: Trial | None = None

    def with_seed(self, seed: int) -> TrainingSpec:
        return self.spec.model_copy(update={"seed": seed})

    def to_json(self) -> dict[str, Any]:
        """As it is kept with the study, and shown."""
        method = self.spec.method.model_dump(mode="json", exclude_none=True)
        told = {"name": self.name, "method": method, "like": self.like}
        if self.task is not None:
            told |= {"method_name": self.method_name, "task": self.task}
        return told | ({"trial": self.trial.to_json()} if self.trial is not None else {})


@dataclass(frozen=True, kw_only=True)
class Fault:
    path: str  #: in the job
    reason: str


def built(
    spec: StudySpec, name: str, changes: Mapping[str, Any], where: Where, base: BaseModelInfo | None
) -> PlannedArm:
    """`changes`: the arm's own part of the job. Raises InvalidRequest naming the request's field that can't be."""
    made = training_spec(spec, changes)
    fault = made if isinstance(made, Fault) else misfit(made, base)
    if fault is not None:
        raise InvalidRequest(fault.reason, param=where.of(fault.path))
    assert isinstance(made, TrainingSpec)
    try:
        check_known_datasets(made)
    except InvalidRequest as refusal:
        raise InvalidRequest(refusal.message, param=where.of(refusal.param or "")) from refusal
    return PlannedArm(name=name, spec=made)


def training_spec(spec: StudySpec, changes: Mapping[str, Any]) -> TrainingSpec | Fault:
    shared = ("model", *FILES, "reuse", *JOB_SETTINGS)
    values = {
        name: value
        for name, value in spec.model_dump(mode="json", include=set(shared)).items()
        if value is not None
    }
    task = spec.task.model_dump(mode="json")
    try:
        return TrainingSpec.model_validate({**values, "task": task, "seed": spec.seeds[0], **changes})
    except ValidationError as error:
        fault = error.errors()[0]
        reason = "there is no such setting" if fault["type"] == "extra_forbidden" else fault["msg"]
        path = ".".join(str(step) for step in fault["loc"])
        return Fault(path=path, reason=reason.removeprefix("Value error, "))


def misfit(made: TrainingSpec, base: BaseModelInfo | None) -> Fault | None:
    """Why the model can't have these stages; None where it can, or nobody knows it."""
    if base is None:
        return None
    for stage in made.stages():
        layers = stage.layers if isinstance(stage.layers, list) else []
        if any(layer >= base.n_layers for layer in layers):
            reason = f"there is no layer {max(layers)}: the model has layers 0 to {base.n_layers - 1}"
            return Fault(path=f"method.{stage.type}.layers", reason=reason)
        if stage.type == "reft" and stage.rank > base.hidden_size:
            reason = (
                f"rank {stage.rank} is too much: the model's hidden states have {base.hidden_size} dimensions"
            )
            return Fault(path="method.reft.rank", reason=reason)
    return None
