"""Requests of `/v1/completions` and `/v1/chat/completions` as in OpenAI's API; `intervention` is HEFT's own.

Fields of OpenAI's API that are not supported here and change the answer are refused by name, unless their value is
empty. All other unknown fields are ignored, and named in the response (`api.schemas.common.ignored_fields`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.schemas.common import LENIENT, MAX_MESSAGES, LenientPart, RequestBody, Text
from api.schemas.conversation import MAX_TOOLS, ConversationMessage, FunctionTool, NamedToolChoice, ToolChoice
from api.schemas.predict import Intervention
from api.schemas.response_format import JsonSchemaFormat, ResponseFormat, checked_schema
from heft_engine.json_schema.arguments_schema import arguments_schema
from heft_engine.json_schema.schema_limits import SchemaSize
from store.messages.generate import Constraint, SamplingParams, ToolUse

#: Texts of one request at most: prompts times n.
MAX_TEXTS = 128
#: The default of max_tokens in OpenAI's `/v1/completions`.
DEFAULT_MAX_TOKENS = 16

_EMPTY: tuple[Any, ...] = (None, False, [], {}, "none")
#: Fields of OpenAI's API that are not supported, and the messages that refuse them.
_UNSUPPORTED = {
    "audio": "audio output is not supported",
    "function_call": "function_call is the older name: send tool_choice",
    "functions": "functions is the older name: send tools",
    "store": "completions are not kept, so they can't be listed later: leave store out",
    "suffix": "inserting text before a suffix is not supported",
    "web_search_options": "web search is not supported",
}
_COMPLETIONS_ONLY = {"echo": "a chat has no prompt to repeat: echo is for /v1/completions"}
_CHAT_ONLY = dict.fromkeys(("tools", "tool_choice"), "tools are for /v1/chat/completions")


def _not_empty(stop: str) -> str:
    if not stop:
        raise ValueError("a stop string must not be empty")
    return stop


#: The token ids of a prompt.
TokenIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]],
    Field(min_length=1, max_length=131_072, fail_fast=True),
]
Stop = Annotated[str, Field(max_length=1_000), AfterValidator(_not_empty)]


class StreamOptions(LenientPart):
    include_usage: bool = False


class GenerationRequest(RequestBody, ABC):
    """The fields of both requests."""

    model_config = LENIENT
    unsupported: ClassVar[Mapping[str, str]] = _UNSUPPORTED

    model: Annotated[str, Field(min_length=1, max_length=300)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _nothing_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, reason in cls.unsupported.items():
            if name in body and body[name] not in _EMPTY:
                raise PydanticCustomError("unsupported", "{reason}", {"path": name, "reason": reason})
        return {name: value for name, value in body.items() if name not in cls.unsupported}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            reason = "stream_options needs stream: true"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "stream_options", "reason": reason})
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def no_usage_yet(self) -> dict[str, None]:
        """The usage of every chunk but the last."""
        return {"usage": None} if self.includes_usage else {}

    def constraint(self) -> Constraint | None:
        """Returns the grammar that the texts must match; None without one."""
        return None

    @abstractmethod
    def inputs(self) -> list[dict[str, Any]]:
        """Returns the prompts as rows."""

    def tool_use(self) -> ToolUse | None:
        """Returns how the answer may call tools; None if it may not."""
        return None

    @property
    def repeats_prompt(self) -> bool:
        return False

    def sampling_params(self) -> SamplingParams:
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


class CompletionRequest(GenerationRequest):
    """A base model continues the bare prompt; a fine-tuned one gets it in the template that it was trained with."""

    unsupported: ClassVar[Mapping[str, str]] = _UNSUPPORTED | _CHAT_ONLY

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_error(cls, prompt: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """A union's errors name each of its forms; only one of them was meant."""
        try:
            return validate(prompt)
        except ValidationError as error:
            reason = "prompt must be a text, a list of token ids that is not empty, or up to {most} of either in a list"
            raise PydanticCustomError("prompt", reason, {"most": MAX_TEXTS}) from error

    @model_validator(mode="after")
    def _within_limits(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            reason = "best_of is not supported: use n and choose among the choices"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "best_of", "reason": reason})
        if len(self.inputs()) * (self.n or 1) > MAX_TEXTS:
            reason = f"a request may have at most {MAX_TEXTS} texts: prompts times n"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "prompt", "reason": reason})
        if self.max_tokens == 0 and not self.echo:
            reason = "max_tokens must be at least 1, unless echo repeats the prompt"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "max_tokens", "reason": reason})
        return self

    def inputs(self) -> list[dict[str, Any]]:
        prompts = (
            [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt
        )
        return [{"prompt": prompt} if isinstance(prompt, str) else {"tokens": prompt} for prompt in prompts]

    @property
    def repeats_prompt(self) -> bool:
        return bool(self.echo)

    def sampling_params(self) -> SamplingParams:
        params = super().sampling_params()
        params["max_tokens"] = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        params["top_logprobs"] = self.logprobs
        return params


class ChatCompletionRequest(GenerationRequest):
    """`max_completion_tokens` is the newer name of `max_tokens`. Without either, an answer has at most as many tokens
    as the model's training answers, but at least 256."""

    unsupported: ClassVar[Mapping[str, str]] = _UNSUPPORTED | _COMPLETIONS_ONLY

    messages: Annotated[
        list[ConversationMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=4)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            reason = "set max_tokens or max_completion_tokens, not both"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "max_tokens", "reason": reason})
        if self.max_tokens == 0:
            reason = "max_tokens must be at least 1"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "max_tokens", "reason": reason})
        if self.top_logprobs is not None and not self.logprobs:
            reason = "top_logprobs needs logprobs: true"
            raise PydanticCustomError("unsupported", "{reason}", {"path": "top_logprobs", "reason": reason})
        return self

    @model_validator(mode="after")
    def _choice_is_offered(self) -> ChatCompletionRequest:
        choice = self.tool_choice
        reason, path = None, "tool_choice"
        if choice not in (None, "none", "auto") and not self.tools:
            reason = "tool_choice needs tools"
        elif isinstance(choice, NamedToolChoice) and choice.function.name not in self._tool_names:
            reason, path = "it is not the name of one of the tools", "tool_choice.function.name"
        if reason is not None:
            raise PydanticCustomError("unsupported", "{reason}", {"path": path, "reason": reason})
        return self

    @model_validator(mode="after")
    def _grammars_hold_the_tools(self) -> ChatCompletionRequest:
        """Checks the schemas of arguments that are decoded under a grammar: of tools that must be called, and of all
        beside a `response_format`, where an answer is either a call or of that format. They become one grammar, and
        are counted together."""
        use = self.tool_use()
        if use is None or (use["choice"] == "auto" and self.constraint() is None):
            return self
        format = self.response_format
        size = format.json_schema.size if isinstance(format, JsonSchemaFormat) else SchemaSize()
        for index, tool in enumerate(self.tools or ()):
            function = tool.function
            if use["name"] in (None, function.name) and function.parameters is not None:
                field = f"tools[{index}].function.parameters"
                strict = bool(function.strict)
                checked_schema(function.parameters, field, strict=strict, size=size, read=arguments_schema)
        return self

    @property
    def _tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    def tool_use(self) -> ToolUse | None:
        """Returns how the answer may call tools; None if it may not. With the choice `none` the model sees no tools."""
        if not self.tools or self.tool_choice == "none":
            return None
        choice = self.tool_choice
        name = choice.function.name if isinstance(choice, NamedToolChoice) else None
        return ToolUse(
            choice="required" if name is not None or choice == "required" else "auto",
            name=name,
            parallel=self.parallel_tool_calls is not False and name is None,
        )

    def constraint(self) -> Constraint | None:
        return self.response_format.constraint() if self.response_format is not None else None

    def inputs(self) -> list[dict[str, Any]]:
        messages = {"messages": [message.turn() for message in self.messages]}
        if self.tool_use() is None:
            return [messages]
        return [messages | {"tools": [tool.row() for tool in self.tools or ()]}]

    def sampling_params(self) -> SamplingParams:
        params = super().sampling_params()
        params["max_tokens"] = self.max_tokens or self.max_completion_tokens
        params["top_logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return params
