"""A fine-tuning job as it is asked for: OpenAI's request, with HEFT's own settings as added fields."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from api.schemas.common import RequestBody
from store.jobs.spec import Hyperparameters, Method, Supervised, TrainingSpec

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


def _random_seed() -> int:
    return secrets.randbelow(2**31)


class JobRequest(RequestBody, TrainingSpec):
    """What `POST /v1/fine_tuning/jobs` takes. Every field but `model` and `training_file` has a default;
    a null is as good as an absent field, since OpenAI's callers send both."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(default_factory=_random_seed)
    metadata: Metadata = Field(default_factory=dict)
    #: OpenAI's older place for them; the same as `method.supervised.hyperparameters`.
    hyperparameters: Hyperparameters | None = None
    #: Accepted empty alone: this service reports to nobody else.
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    @model_validator(mode="after")
    def _hyperparameters_once(self) -> Self:
        if self.hyperparameters is None or "method" not in self.model_fields_set:
            return self
        if self.method.type != "supervised" or self.method.supervised is not None:
            raise ValueError(
                "hyperparameters is the older place of method.supervised.hyperparameters: give only one"
            )
        return self

    def spec(self) -> TrainingSpec:
        """What is stored and trained: the request without what belongs to the API alone."""
        chosen = {name: getattr(self, name) for name in TrainingSpec.model_fields}
        if self.hyperparameters is not None:
            supervised = Supervised(hyperparameters=self.hyperparameters)
            chosen["method"] = Method(type="supervised", supervised=supervised)
        return TrainingSpec(**chosen)

    def as_sent(self) -> dict[str, Any]:
        """The request without defaults or the random seed, to compare it with another one."""
        return self.model_dump(mode="json", exclude_unset=True)
