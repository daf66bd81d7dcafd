"""The request for a fine-tuning job: OpenAI's, with HEFT's settings as added fields."""

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
    """The body of `POST /v1/fine_tuning/jobs`. All fields but `model` and `training_file` have defaults. A null field
    counts as absent, because OpenAI's clients send both."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(default_factory=_random_seed)
    metadata: Metadata = Field(default_factory=dict)
    #: OpenAI's older field for `method.supervised.hyperparameters`.
    hyperparameters: Hyperparameters | None = None

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
            raise ValueError("set method.supervised.hyperparameters or the older hyperparameters, not both")
        return self

    def spec(self) -> TrainingSpec:
        """Returns the stored part of the request, which is trained."""
        fields = {name: getattr(self, name) for name in TrainingSpec.model_fields}
        if self.hyperparameters is not None:
            supervised = Supervised(hyperparameters=self.hyperparameters)
            fields["method"] = Method(type="supervised", supervised=supervised)
        return TrainingSpec(**fields)

    def as_sent(self) -> dict[str, Any]:
        """Returns the request without defaults and random seed, to compare it with a repeated one."""
        return self.model_dump(mode="json", exclude_unset=True)
