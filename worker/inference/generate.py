"""The task behind `/v1/completions` and `/v1/chat/completions`: texts are sent as they are generated.

The batcher's thread generates, for all requests of a model together. The thread that Celery gives a request waits for
its deltas and sends those of a few hundredths of a second in one reply.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

from heft_engine.data.tool_calls.format import AnswerParser
from heft_engine.serving.predictor import Predictor
from heft_engine.serving.text_generator import TextDelta
from store.messages.generate import (
    GeneratedPart,
    GeneratedToken,
    GeneratedToolCall,
    GeneratedUsage,
    GenerateMessage,
    GenerateReply,
    TopToken,
)
from worker.inference.models import Models
from worker.inference.requests import POLL_SECONDS, ActiveRequest, Requests
from worker.inference.text_batch import IndexedDelta, TextBatch, start

#: Deltas that come within this time go out together.
COALESCE_SECONDS = 0.03


class GenerateHandler:
    """Safe to call from many threads."""

    def __init__(self, models: Models, requests: Requests) -> None:
        self._models = models
        self._requests = requests

    def handle(self, message: GenerateMessage) -> None:
        """Answers a request, with its texts or with the error that prevents them."""
        self._requests.answer(message, lambda request: self._answer(message, request))

    def _answer(self, message: GenerateMessage, request: ActiveRequest) -> None:
        with self._models.use(message["model"], "text") as predictor:
            batch = start(predictor, message)
            try:
                for reply in _replies(message, batch, request, predictor):
                    request.reply(reply)
            finally:
                for index in batch.unfinished:
                    predictor.cancel((batch.request_id, index))


def _replies(
    message: GenerateMessage, batch: TextBatch, request: ActiveRequest, predictor: Predictor
) -> Iterator[GenerateReply]:
    """Yields a request's replies, one where it is not streamed; the last has `done`. Raises what ended a text."""
    parts: dict[int, GeneratedPart] = {}
    completion_tokens: dict[int, int] = {}
    while batch.unfinished:
        for index, delta in _next_deltas(batch, request):
            if index not in batch.unfinished:
                continue  # it was cancelled
            if isinstance(delta, Exception):
                raise delta
            part = parts.setdefault(index, GeneratedPart(index=index, text="", tokens=[], finish_reason=None))
            append_delta(part, delta, batch.parsers.get(index))
            completion_tokens[index] = delta.completion_tokens
            if part["finish_reason"] is not None:
                batch.unfinished.discard(index)
            if part["finish_reason"] is not None and delta.finish_reason is None:
                predictor.cancel((batch.request_id, index))
        if not batch.unfinished:
            usage = GeneratedUsage(
                prompt_tokens=batch.prompt_tokens, completion_tokens=sum(completion_tokens.values())
            )
            yield GenerateReply(request_id=batch.request_id, chunk=_chunk(parts), done=usage)
            return
        if message["stream"]:
            yield GenerateReply(request_id=batch.request_id, chunk=_chunk(parts))
            parts = {}
        time.sleep(COALESCE_SECONDS)


def _next_deltas(batch: TextBatch, request: ActiveRequest) -> Iterator[IndexedDelta]:
    """Waits for a delta, then yields all that are there. Raises RequestAbandoned."""
    while True:
        request.check_active()
        try:
            yield batch.deltas.get(timeout=POLL_SECONDS)
            break
        except queue.Empty:
            continue
    while True:
        try:
            yield batch.deltas.get_nowait()
        except queue.Empty:
            return


def append_delta(part: GeneratedPart, delta: TextDelta, parser: AnswerParser | None) -> None:
    """Adds a delta to a part: its text as it is, or what `parser` makes of it."""
    if parser is None:
        part["text"] += delta.text
    else:
        _append_parsed(part, delta, parser)
    part["tokens"] += [
        GeneratedToken(
            bytes=list(token.token_bytes),
            logprob=token.logprob,
            top=[TopToken(bytes=list(spelling), logprob=value) for spelling, value in token.top_logprobs],
            offset=token.text_offset,
        )
        for token in delta.tokens
    ]
    part["finish_reason"] = delta.finish_reason
    if parser is not None and parser.calls and (parser.is_complete or delta.finish_reason == "stop"):
        part["finish_reason"] = "tool_calls"


def _append_parsed(part: GeneratedPart, delta: TextDelta, parser: AnswerParser) -> None:
    index = parser.calls
    answer = parser.push(delta.text)
    if delta.finish_reason is not None:
        answer += parser.flush()
    for piece in answer:
        if isinstance(piece, str):
            part["text"] += piece
            continue
        call = GeneratedToolCall(index=index, id=piece.id, name=piece.name, arguments=piece.arguments)
        part.setdefault("tool_calls", []).append(call)
        index += 1


def _chunk(parts: dict[int, GeneratedPart]) -> list[GeneratedPart]:
    return [parts[index] for index in sorted(parts)]
