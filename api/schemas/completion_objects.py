"""What `/v1/completions` and `/v1/chat/completions` answer: OpenAI's objects, whole and as chunks of a stream.

It does NOT know requests or workers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from api.schemas.predict import Usage
from store.messages.generate import GeneratedPart, GeneratedToken

FinishReason = Literal["stop", "length"]


class CompletionLogprobs(BaseModel):
    """OpenAI's older shape: one list each, token by token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: list[GeneratedToken], *, likeliest: int) -> CompletionLogprobs:
        tops = [
            {_name(top["bytes"]): top["logprob"] for top in token["top"]}
            # The chosen token is always among them.
            | {_name(token["bytes"]): token["logprob"]}
            for token in tokens
        ]
        return cls(
            tokens=[_name(token["bytes"]) for token in tokens],
            token_logprobs=[token["logprob"] for token in tokens],
            top_logprobs=tops if likeliest else None,
            text_offset=[token["offset"] for token in tokens],
        )


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None

    @classmethod
    def of(cls, part: GeneratedPart, *, likeliest: int | None) -> CompletionChoice:
        """`likeliest`: how many other tokens were asked for; None for no log-probabilities."""
        tokens = part["tokens"]
        logprobs = None if likeliest is None else CompletionLogprobs.of(tokens, likeliest=likeliest)
        return cls(
            text=part["text"], index=part["index"], logprobs=logprobs, finish_reason=part["finish_reason"]
        )


class Completion(BaseModel):
    """Whole, or a chunk of a stream, where `usage` comes last and alone."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


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


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None

    @classmethod
    def of(cls, part: GeneratedPart, *, with_logprobs: bool) -> ChatChoice:
        return cls(
            index=part["index"],
            message=AssistantMessage(content=part["text"]),
            logprobs=ChatLogprobs.of(part["tokens"]) if with_logprobs else None,
            finish_reason=part["finish_reason"],
        )


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a stream. `usage` comes last and alone."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


def _text(spelling: list[int]) -> str:
    return bytes(spelling).decode(errors="replace")


def _name(spelling: list[int]) -> str:
    """A token that is part of a character stands as OpenAI's API writes it: `bytes:\\xe2\\x82`."""
    try:
        return bytes(spelling).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
