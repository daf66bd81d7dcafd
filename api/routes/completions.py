"""Text in OpenAI's shapes, whole or streamed, written by the inference workers. A waiting route holds no thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from api.admission import Admission
from api.cancellation import while_connected
from api.clients.generate import Replies
from api.deps import Db, Key, Services, ServicesDep
from api.routes.predict import addressed
from api.schemas.completion_objects import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    Delta,
)
from api.schemas.completions import ChatCompletionRequest, CompletionRequest, WriteRequestBody
from api.schemas.predict import Usage
from api.sse import TextStream
from store import ids, models
from store.errors import InvalidRequest
from store.messages.generate import GeneratedPart, GeneratedUsage, GenerateReply
from store.messages.predict import Intervention

router = APIRouter(prefix="/v1", tags=["Answers"])
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@router.post("/completions", response_model=Completion, responses=_STREAMED)
async def complete(
    request: Request, body: CompletionRequest, key: Key, db: Db, services: ServicesDep
) -> Response | Completion:
    """Text that goes on from a prompt, by a fine-tuned text model, a checkpoint of one or a base model."""
    caller, model = await db(models.authorize, key=key, model_id=body.model)
    completion = partial(
        Completion,
        id=ids.new_completion_id(),
        object="text_completion",
        created=int(time.time()),
        model=body.model,
    )

    def choices(parts: list[GeneratedPart]) -> list[CompletionChoice]:
        return [CompletionChoice.of(part, likeliest=body.logprobs) for part in parts]

    def chunks(reply: GenerateReply) -> Iterator[BaseModel]:
        for choice in choices(reply.get("chunk", [])):
            yield completion(choices=[choice], **body.no_usage_yet)
        if "done" in reply and body.includes_usage:
            yield completion(choices=[], usage=_usage(reply["done"]))

    asked = _asked(request, body, model, caller.id, services)
    if body.stream:
        return await _stream(asked, chunks)
    parts, usage = await _whole(asked)
    return completion(choices=choices(parts), usage=usage)


@router.post("/chat/completions", response_model=ChatCompletion, responses=_STREAMED)
async def chat(
    request: Request, body: ChatCompletionRequest, key: Key, db: Db, services: ServicesDep
) -> Response | ChatCompletion:
    """The next turn of a conversation, by a fine-tuned text model, a checkpoint of one or a base model."""
    caller, model = await db(models.authorize, key=key, model_id=body.model)
    head: dict[str, Any] = {
        "id": ids.new_chat_completion_id(),
        "created": int(time.time()),
        "model": body.model,
    }
    chunk = partial(ChatChunk, object="chat.completion.chunk", **head)
    begun: set[int] = set()

    def chunks(reply: GenerateReply) -> Iterator[BaseModel]:
        for part in reply.get("chunk", []):
            for choice in _deltas(part, begun, with_logprobs=bool(body.logprobs)):
                yield chunk(choices=[choice], **body.no_usage_yet)
        if "done" in reply and body.includes_usage:
            yield chunk(choices=[], usage=_usage(reply["done"]))

    asked = _asked(request, body, model, caller.id, services)
    if body.stream:
        return await _stream(asked, chunks)
    parts, usage = await _whole(asked)
    choices = [ChatChoice.of(part, with_logprobs=bool(body.logprobs)) for part in parts]
    return ChatCompletion(choices=choices, usage=usage, **head)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request for `texts` texts, admitted and sent when it is waited for."""

    request: Request
    admission: Admission
    texts: int
    replies: Replies


def _asked(
    request: Request, body: WriteRequestBody, model: models.Model, owner_id: str, services: Services
) -> _Asked:
    """Raises InvalidRequest for a model that does not write text."""
    task = model.task.get("type")
    if task not in (None, "text"):
        raise InvalidRequest(
            f"{model.id} answers {task} questions, with probabilities: ask it through POST /predict",
            param="model",
        )
    inputs = body.inputs()
    replies = services.texts.ask(
        request.state.request_id,
        addressed(model, owner_id),
        inputs,
        n=body.n or 1,
        wish=body.wish(),
        stream=bool(body.stream),
        intervention=Intervention(enabled=body.intervention.enabled, scale=body.intervention.scale),
    )
    texts = len(inputs) * (body.n or 1)
    return _Asked(request=request, admission=services.text_admission, texts=texts, replies=replies)


async def _stream(asked: _Asked, chunks: Callable[[GenerateReply], Iterable[BaseModel]]) -> Response:
    with ExitStack() as until_end:
        until_end.enter_context(asked.admission.admit(asked.texts))
        try:
            first = await while_connected(asked.request, asked.replies.next())
        except BaseException:
            await asked.replies.close()
            raise
        return TextStream(asked.replies, first, chunks, until_end.pop_all())


async def _whole(asked: _Asked) -> tuple[list[GeneratedPart], Usage]:
    with asked.admission.admit(asked.texts):
        try:
            reply = await while_connected(asked.request, asked.replies.next())
        finally:
            await asked.replies.close()
    assert reply is not None
    return reply["chunk"], _usage(reply["done"])


def _usage(usage: GeneratedUsage) -> Usage:
    return Usage.of(prompt=usage["prompt_tokens"], completion=usage["completion_tokens"])


def _deltas(part: GeneratedPart, begun: set[int], *, with_logprobs: bool) -> Iterator[ChunkChoice]:
    """A choice's role comes first, its end last and alone."""
    index = part["index"]
    if index not in begun:
        begun.add(index)
        yield _delta(index, Delta(role="assistant", content=""))
    if part["text"] or part["tokens"]:
        logprobs = ChatLogprobs.of(part["tokens"]) if with_logprobs else None
        yield _delta(index, Delta(content=part["text"]), logprobs)
    if part["finish_reason"] is not None:
        yield ChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=part["finish_reason"])


def _delta(index: int, delta: Delta, logprobs: ChatLogprobs | None = None) -> ChunkChoice:
    return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)
