"""`/v1/completions` and `/v1/chat/completions` as OpenAI's API has them: what may be asked, field by field.

A field that means something there and can't be done here is refused by its name, unless its value asks for nothing.
`intervention` is HEFT's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from api.schemas.common import RequestBody
from api.schemas.predict import Intervention
from store.messages.generate import SamplingParams

#: Texts that one request may ask for, prompts times n.
MOST_TEXTS = 128
#: What an OpenAI client gets from `/v1/completions` when it names no max_tokens.
USUAL_MAX_TOKENS = 16

#: Fields that other services know, and why they are refused here when they ask for something.
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "none")
_UNSUPPORTED = {
    "audio": "these models write text alone",
    "function_call": "these models call no functions",
    "functions": "these models call no functions",
    "prediction": "predicted outputs are not supported",
    "reasoning_effort": "these models do not reason before they answer",
    "suffix": "these models write on at the end alone",
    "tool_choice": "these models call no tools",
    "tools": "these models call no tools",
    "web_search_options": "these models search nothing",
    "echo": "the prompt is not repeated; the answer alone comes back",
}


def _not_blank(stop: str) -> str:
    if not stop:
        raise ValueError("a stop string can't be empty")
    return stop


Stop = Annotated[str, Field(max_length=1_000), AfterValidator(_not_blank)]


class StreamOptions(RequestBody):
    include_usage: bool = False
    include_obfuscation: bool = False  #: accepted for OpenAI's clients; streams are never padded here


class TextFormat(RequestBody):
    type: Literal["text"]


class WriteRequestBody(RequestBody, ABC):
    """What both have in common. `user`, `metadata`, `store` and the like are accepted and not kept."""

    model: Annotated[str, Field(min_length=1, max_length=300)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1_024),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    intervention: Intervention = Intervention()
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, reason in _UNSUPPORTED.items():
            if name in body and not any(body[name] is one or body[name] == one for one in _NOTHING):
                raise PydanticCustomError("unsupported", "{reason}", {"path": name, "reason": reason})
        return {name: value for name, value in body.items() if name not in _UNSUPPORTED}

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> WriteRequestBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "unsupported", "{reason}", {"path": "stream_options", "reason": "it belongs to a stream"}
            )
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def no_usage_yet(self) -> dict[str, None]:
        """What every chunk but the last says of usage."""
        return {"usage": None} if self.includes_usage else {}

    @abstractmethod
    def inputs(self) -> list[dict[str, Any]]:
        """The prompts as rows."""

    def wish(self) -> SamplingParams:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            top_logprobs=None,
            stop=stops,
        )


class CompletionRequest(WriteRequestBody):
    """A base model goes on from the bare prompt; a fine-tuned one is asked through the template it was trained on."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _text_alone(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(isinstance(part, int | list) for part in prompt):
            raise ValueError("token ids are not accepted: send the prompt as text")
        return prompt

    @model_validator(mode="after")
    def _within_bounds(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            reason = "the best of several is not chosen here: ask for n and choose"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "best_of", "reason": reason})
        if len(self.inputs()) * (self.n or 1) > MOST_TEXTS:
            reason = f"at most {MOST_TEXTS} texts at a time, prompts times n"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "prompt", "reason": reason})
        return self

    def inputs(self) -> list[dict[str, Any]]:
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [{"prompt": prompt} for prompt in prompts]

    def wish(self) -> SamplingParams:
        wish = super().wish()
        wish["max_tokens"] = wish["max_tokens"] or USUAL_MAX_TOKENS
        wish["top_logprobs"] = self.logprobs
        return wish


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


class ConversationMessage(RequestBody):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """An answer that is sent back brings a null for all that it is not."""
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value is not None}


class ChatCompletionRequest(WriteRequestBody):
    """`max_completion_tokens` is the newer name of `max_tokens`; without either an answer goes on to its end, and at
    most as far as the model was trained to answer (256 tokens at least)."""

    messages: Annotated[list[ConversationMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            reason = "give max_tokens or max_completion_tokens, not both"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "max_tokens", "reason": reason})
        if self.top_logprobs is not None and not self.logprobs:
            reason = "it needs logprobs: true"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "top_logprobs", "reason": reason})
        return self

    def inputs(self) -> list[dict[str, Any]]:
        return [{"messages": [message.model_dump() for message in self.messages]}]

    def wish(self) -> SamplingParams:
        wish = super().wish()
        wish["max_tokens"] = self.max_tokens or self.max_completion_tokens
        wish["top_logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return wish
