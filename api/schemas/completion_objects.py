"""Responses of `/v1/completions` and `/v1/chat/completions` as in OpenAI's API, complete and as chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import BaseModel, Field

from api.schemas.predict import Usage
from store.messages.generate import GeneratedPart, GeneratedToken, GeneratedToolCall

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(BaseModel):
    """OpenAI's older format: lists with one item per token."""

    tokens: list[str]
    token_logprobs: list[float | None]  #: null for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: list[GeneratedToken], *, top_logprobs: int) -> CompletionLogprobs:
        top = [_alternatives(token) for token in tokens]
        return cls(
            tokens=[_name(token["bytes"]) for token in tokens],
            token_logprobs=[token["logprob"] for token in tokens],
            top_logprobs=top if top_logprobs else None,
            text_offset=[token["offset"] for token in tokens],
        )


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class TextUsage(Usage):
    """`cached_tokens` is 0: prompts of texts are computed anew."""

    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, *, prompt: int, completion: int) -> Self:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            # No default: the chunks of a stream are written without what was not set.
            prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        )


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None

    @classmethod
    def of(cls, part: GeneratedPart, *, top_logprobs: int | None) -> CompletionChoice:
        """`top_logprobs`: the number of requested alternatives; None for no log-probabilities."""
        logprobs = None
        if top_logprobs is not None:
            logprobs = CompletionLogprobs.of(part["tokens"], top_logprobs=top_logprobs)
        assert part["finish_reason"] != "tool_calls", "completions have no tools"
        return cls(
            text=part["text"], index=part["index"], logprobs=logprobs, finish_reason=part["finish_reason"]
        )


class Completion(BaseModel):
    """A completion, or a chunk of a stream, whose `usage` is in a last chunk of its own."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TextUsage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None = None

    @classmethod
    def of(cls, tokens: list[GeneratedToken]) -> ChatLogprobs:
        return cls(
            content=[
                ChatToken(
                    token=_text(token["bytes"]),
                    logprob=token["logprob"],
                    bytes=token["bytes"],
                    top_logprobs=[
                        TopLogprob(token=_text(top["bytes"]), logprob=top["logprob"], bytes=top["bytes"])
                        for top in token["top"]
                    ],
                )
                for token in tokens
            ]
        )


class CalledFunction(BaseModel):
    """`arguments`: a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @classmethod
    def of(cls, call: GeneratedToolCall) -> ToolCall:
        return cls(id=call["id"], function=CalledFunction(name=call["name"], arguments=call["arguments"]))


class AssistantMessage(BaseModel):
    """`content` is null in an answer of nothing but tool calls. `tool_calls` is left out of an answer without any."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=lambda calls: calls is None)

    @classmethod
    def of(cls, part: GeneratedPart) -> AssistantMessage:
        calls = [ToolCall.of(call) for call in part.get("tool_calls", [])]
        if not calls:
            return cls(content=part["text"])
        return cls(content=part["text"] or None, tool_calls=calls)


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None

    @classmethod
    def of(cls, part: GeneratedPart, *, with_logprobs: bool) -> ChatChoice:
        return cls(
            index=part["index"],
            message=AssistantMessage.of(part),
            logprobs=ChatLogprobs.of(part["tokens"]) if with_logprobs else None,
            finish_reason=part["finish_reason"],
        )


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TextUsage


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """A part of the call number `index` of an answer: the first one has its id and name, the others its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta

    @classmethod
    def of(cls, call: GeneratedToolCall) -> Iterator[ToolCallDelta]:
        """Yields the deltas of a complete call."""
        index = call["index"]
        function = FunctionDelta(name=call["name"], arguments="")
        yield cls(index=index, id=call["id"], type="function", function=function)
        yield cls(index=index, function=FunctionDelta(arguments=call["arguments"]))


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None


class ChatChunk(BaseModel):
    """A chunk of a stream. `usage` is in a last chunk of its own."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: TextUsage | None = None


def _alternatives(token: GeneratedToken) -> dict[str, float] | None:
    """Returns the likeliest tokens in a token's place, and itself, as OpenAI's API does."""
    if token["logprob"] is None:
        return None
    return {_name(top["bytes"]): top["logprob"] for top in token["top"]} | {
        _name(token["bytes"]): token["logprob"]
    }


def _text(token: list[int]) -> str:
    return bytes(token).decode(errors="replace")


def _name(token: list[int]) -> str:
    """A token that is a part of a character is written as in OpenAI's API: `bytes:\\xe2\\x82`."""
    try:
        return bytes(token).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
