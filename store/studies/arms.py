"""The arms of a study: an arm's job settings, built from the study's and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from store.db.states import TrialState
from store.errors import InvalidRequest
from store.jobs.spec import TrainingSpec, check_new
from store.storage.files import FILE_FIELDS
from store.studies.dotted_settings import JOB_SETTINGS, RequestFields
from store.studies.spec import StudySpec


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """The shape of a base model, as its worker reported it."""

    n_layers: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial of a search."""

    number: int
    params: dict[str, Any]
    state: TrialState = "running"
    value: float | None = None  #: of a complete trial: the mean over its seeds on the validation rows
    reason: str | None = None  #: for `failed`, or for `pruned`: invalid settings, without jobs

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """An arm: a job for each seed."""

    name: str
    spec: TrainingSpec  #: with the first seed
    #: The arm whose compute it matches: its epochs are chosen, and its jobs created, once that is measured.
    equal_compute_to: str | None = None
    #: In a study of several methods on several tasks: the arm's method and task.
    method_name: str | None = None
    task: str | None = None
    trial: Trial | None = None

    def with_seed(self, seed: int) -> TrainingSpec:
        # Arms that were stored before there were checkpoints of epochs do not say that they have none.
        return self.spec.model_copy(update={"seed": seed, "n_checkpoints": 0})

    def to_json(self) -> dict[str, Any]:
        """Returns the arm as it is stored in `planned` of the study's spec, and shown."""
        method = self.spec.method.model_dump(mode="json", exclude_none=True)
        values = {"name": self.name, "method": method, "like": self.equal_compute_to}
        if self.task is not None:
            values |= {"method_name": self.method_name, "task": self.task}
        if self.trial is not None:
            values["trial"] = self.trial.to_json()
        return values


@dataclass(frozen=True, kw_only=True)
class InvalidSetting:
    path: str  #: in the job's settings
    reason: str


def build_arm(
    spec: StudySpec, name: str, changes: Mapping[str, Any], fields: RequestFields, base: BaseModelInfo | None
) -> PlannedArm:
    """Returns the arm with the study's settings and `changes`. Raises InvalidRequest naming an invalid field."""
    job_spec = training_spec(spec, changes)
    error = job_spec if isinstance(job_spec, InvalidSetting) else _check_base_model(job_spec, base)
    if error is not None:
        raise InvalidRequest(error.reason, param=fields.param(error.path))
    assert isinstance(job_spec, TrainingSpec)
    try:
        check_new(job_spec)
    except InvalidRequest as refusal:
        raise InvalidRequest(refusal.message, param=fields.param(refusal.param or "")) from refusal
    return PlannedArm(name=name, spec=job_spec)


def training_spec(spec: StudySpec, changes: Mapping[str, Any]) -> TrainingSpec | InvalidSetting:
    """Returns the settings of an arm's jobs: the study's with `changes`; or the first invalid setting."""
    shared = spec.model_dump(mode="json", include={"model", *FILE_FIELDS, "reuse", *JOB_SETTINGS})
    values = {name: value for name, value in shared.items() if value is not None}
    task = spec.task.model_dump(mode="json")
    try:
        # Nobody asks the epochs of hundreds of jobs.
        fixed = {"task": task, "seed": spec.seeds[0], "n_checkpoints": 0}
        return TrainingSpec.model_validate({**values, **fixed, **changes})
    except ValidationError as invalid:
        error = invalid.errors()[0]
        reason = "there is no such setting" if error["type"] == "extra_forbidden" else error["msg"]
        path = ".".join(str(name) for name in error["loc"])
        return InvalidSetting(path=path, reason=reason.removeprefix("Value error, "))


def _check_base_model(spec: TrainingSpec, base: BaseModelInfo | None) -> InvalidSetting | None:
    """Returns the first stage setting that the base model can't have; None if all fit or the model is unknown."""
    if base is None:
        return None
    for stage in spec.stages():
        layers = stage.layers if isinstance(stage.layers, list) else []
        if any(layer >= base.n_layers for layer in layers):
            reason = f"there is no layer {max(layers)}: the model has layers 0 to {base.n_layers - 1}"
            return InvalidSetting(path=f"method.{stage.type}.layers", reason=reason)
        if stage.type == "reft" and stage.rank > base.hidden_size:
            reason = f"rank {stage.rank} is greater than the model's hidden size of {base.hidden_size}"
            return InvalidSetting(path="method.reft.rank", reason=reason)
    return None
