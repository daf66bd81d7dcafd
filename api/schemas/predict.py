"""Requests and responses of /predict: one question or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from api.schemas.common import MAX_MESSAGES, NonEmptyText, RequestBody, RequestPart, Text
from store.errors import TooLarge
from store.messages.predict import PredictedRow

#: Questions of one request at most.
MAX_INPUTS = 1_024

Choice = Annotated[str, Field(max_length=10_000)]


class ChatMessage(RequestPart):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class Question(RequestPart):
    """One of `question` (with an optional passage and choices), `prompt` and `messages`."""

    question: NonEmptyText | None = None
    passage: Text | None = None
    choices: Annotated[list[Choice], Field(min_length=2, max_length=100, fail_fast=True)] | None = None
    prompt: NonEmptyText | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None

    @model_validator(mode="after")
    def _one_form(self) -> Question:
        forms = [name for name in ("question", "prompt", "messages") if getattr(self, name) is not None]
        if len(forms) > 1:
            raise ValueError(f"set one of question, prompt and messages, not {' and '.join(forms)}")
        if self.question is None and (self.passage is not None or self.choices is not None):
            raise ValueError("passage and choices need a question")
        return self

    @property
    def is_asked(self) -> bool:
        return not (self.question is None and self.prompt is None and self.messages is None)

    def row(self) -> dict[str, Any]:
        """Returns the question as a row."""
        return self.model_dump(include=set(Question.model_fields), exclude_none=True)


class Intervention(RequestPart):
    """Stage 2's intervention in this request: disabled, or scaled, h + scale · (Φ(h) − h)."""

    enabled: bool = True
    scale: Annotated[float, Field(ge=-100, le=100)] = 1.0


class PredictRequest(RequestBody, Question):
    """One question, or up to 1,024 in `inputs`. Answers with a probability below `abstain_below` are null."""

    model: Annotated[str, Field(min_length=1, max_length=300)]
    inputs: (
        Annotated[
            list[Question],
            Field(min_length=1, fail_fast=True, json_schema_extra={"maxItems": MAX_INPUTS}),
        ]
        | None
    ) = None
    intervention: Intervention = Intervention()
    abstain_below: (
        Annotated[float, Field(ge=0, le=1, description="Answers with a lower probability are null.")] | None
    ) = None

    @field_validator("inputs", mode="before")
    @classmethod
    def _not_too_many(cls, inputs: Any) -> Any:
        """Raises TooLarge, which pydantic lets through, before any input is validated."""
        if isinstance(inputs, list) and len(inputs) > MAX_INPUTS:
            raise TooLarge(f"at most {MAX_INPUTS:,} inputs at a time", param="inputs")
        return inputs

    @model_validator(mode="after")
    def _one_question_or_inputs(self) -> PredictRequest:
        if self.is_asked == (self.inputs is not None):
            raise ValueError("set one of question, prompt, messages and inputs")
        if not all(question.is_asked for question in self.inputs or ()):
            raise ValueError("each input must have a question, a prompt or messages")
        return self

    def rows(self) -> list[dict[str, Any]]:
        """Returns the questions as JSON rows."""
        return [self.row()] if self.inputs is None else [question.row() for question in self.inputs]

    def response(self, predicted: Sequence[PredictedRow]) -> Prediction | Predictions:
        """Returns the response to this request, from the predictions for its rows."""
        usage = Usage.of(
            prompt=sum(row["prompt_tokens"] for row in predicted),
            completion=sum(row["completion_tokens"] for row in predicted),
        )
        answers = [Answer.of(row, abstain_below=self.abstain_below) for row in predicted]
        if self.inputs is None:
            return Prediction(model=self.model, usage=usage, **answers[0].model_dump())
        return Predictions(model=self.model, usage=usage, data=answers)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, *, prompt: int, completion: int) -> Self:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Answer(BaseModel):
    """An answer: the most probable label with its probability, or generated text, without probabilities.

    If the probability is below the request's `abstain_below`, `answer` is null and `abstained` true.
    """

    object: Literal["prediction"] = "prediction"
    answer: str | None
    abstained: bool
    probability: float | None
    label_probabilities: dict[str, float] | None

    @classmethod
    def of(cls, row: PredictedRow, *, abstain_below: float | None = None) -> Answer:
        probability = row["probability"]
        abstained = abstain_below is not None and probability is not None and probability < abstain_below
        return Answer(
            answer=None if abstained else row["answer"],
            abstained=abstained,
            probability=probability,
            label_probabilities=row["label_probabilities"],
        )


class Prediction(Answer):
    """The answer to one question."""

    model: str
    usage: Usage


class Predictions(BaseModel):
    """The answers to `inputs`, in their order."""

    object: Literal["list"] = "list"
    model: str
    data: list[Answer]
    usage: Usage
