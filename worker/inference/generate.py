"""Text for requests from the queue: each joins those that its model is writing already, and is told piece by piece.

One thread writes (a pass at a time for all texts of a model, between other questions); the thread that Celery gives a
request waits for its pieces and sends them on, those of a few hundredths of a second together. A request whose
client has gone leaves the batch. It does NOT know owners, jobs or OpenAI's shapes.
"""

from __future__ import annotations

import json
import logging
import queue
import time
from collections.abc import Iterator

from redis.exceptions import RedisError

from heft_engine.errors import EngineError
from heft_engine.serving.text_generator import TextDelta
from store.errors import StoreError
from store.messages.generate import (
    GeneratedPart,
    GeneratedToken,
    GeneratedUsage,
    GenerateMessage,
    GenerateReply,
    TopToken,
)
from store.messages.predict import REPLY_SECONDS, PredictFault
from worker.inference.cancellations import LOOK_SECONDS
from worker.inference.predict import Inference, RequestAbandoned, check_active, fault_of
from worker.inference.text_requests import Heard, Texts, begin

log = logging.getLogger(__name__)

#: Pieces of a stream that come within so long of the last ones go out together.
TOGETHER_SECONDS = 0.03


class Generation:
    """Writes for each request from whatever thread it comes on, with the models that `inference` holds."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._redis = inference.redis
        self._cancelled = inference.cancelled

    def answer(self, message: GenerateMessage) -> None:
        """Write, or say why not; what nobody waits for any more is dropped."""
        request_id = message["request_id"]
        try:
            with self._cancelled.waiting(request_id, sent_at=message["sent_at"]):
                self._answer(message)
        except RequestAbandoned:
            log.info("nobody waits for %s any more", request_id)
        except (EngineError, StoreError) as fault:
            self._reply(message, GenerateReply(request_id=request_id, error=fault_of(fault)))
        except Exception:
            error = PredictFault(status=500, code="internal_error", message="the worker failed", param=None)
            self._reply(message, GenerateReply(request_id=request_id, error=error))
            raise

    def _answer(self, message: GenerateMessage) -> None:
        self._check_active(message)
        with self._inference.holding(message["model"], "text") as predictor:
            texts = begin(predictor, message)
            unfinished = set(range(texts.count))
            try:
                for reply in self._replies(message, texts, unfinished):
                    self._reply(message, reply)
            finally:
                for index in unfinished:
                    predictor.cancel((texts.request_id, index))

    def _replies(
        self, message: GenerateMessage, texts: Texts, unfinished: set[int]
    ) -> Iterator[GenerateReply]:
        """All of a request's, the last with `done`. Raises what ended a text."""
        whole: dict[int, GeneratedPart] = {}
        written = dict.fromkeys(range(texts.count), 0)
        while unfinished:
            parts = whole if not message["stream"] else {}
            for index, piece in self._next(message, texts.heard):
                if isinstance(piece, Exception):
                    raise piece
                _add(parts, index, piece)
                written[index] = piece.completion_tokens
                if piece.finish_reason is not None:
                    unfinished.discard(index)
            if message["stream"] or not unfinished:
                reply = GenerateReply(
                    request_id=texts.request_id, chunk=[parts[index] for index in sorted(parts)]
                )
                if not unfinished:
                    reply["done"] = GeneratedUsage(
                        prompt_tokens=texts.prompt_tokens, completion_tokens=sum(written.values())
                    )
                yield reply
            if unfinished:
                time.sleep(TOGETHER_SECONDS)

    def _next(self, message: GenerateMessage, heard: queue.SimpleQueue[Heard]) -> Iterator[Heard]:
        """Waits for a piece, then takes all that are there. Raises RequestAbandoned."""
        while True:
            self._check_active(message)
            try:
                yield heard.get(timeout=LOOK_SECONDS)
                break
            except queue.Empty:
                continue
        while True:
            try:
                yield heard.get_nowait()
            except queue.Empty:
                return

    def _check_active(self, message: GenerateMessage) -> None:
        check_active(self._cancelled, message["request_id"], message["deadline"])

    def _reply(self, message: GenerateMessage, reply: GenerateReply) -> None:
        payload = json.dumps(reply, allow_nan=False)
        try:
            with self._redis.pipeline() as pipe:
                pipe.rpush(message["reply_to"], payload)
                pipe.expire(message["reply_to"], REPLY_SECONDS)
                pipe.execute()
        except RedisError as fault:
            log.warning("no answer to %s: the broker is away: %s", message["request_id"], fault)


def _add(parts: dict[int, GeneratedPart], index: int, piece: TextDelta) -> None:
    part = parts.setdefault(index, GeneratedPart(index=index, text="", tokens=[], finish_reason=None))
    part["text"] += piece.text
    part["tokens"] += [
        GeneratedToken(
            bytes=list(token.token_bytes),
            logprob=token.logprob,
            top=[TopToken(bytes=list(spelling), logprob=value) for spelling, value in token.top_logprobs],
            offset=token.text_offset,
        )
        for token in piece.tokens
    ]
    part["finish_reason"] = piece.finish_reason
