"""Requests to the inference worker: whether their clients still wait, and the replies to them.

The API marks the requests of clients that have gone in Redis. A worker looks for marks of all of its requests at once,
at most four times a second, and never for a request that has just come. A failure of the device ends the process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from heft_engine.errors import ConfigError, EngineError, ModelError, Overloaded, RowError
from heft_engine.runtime.device_failure import is_device_failure
from store.errors import StoreError, Unavailable
from store.logs import bound
from store.messages.generate import GenerateMessage, GenerateReply
from store.messages.predict import (
    REPLY_SECONDS,
    PredictFault,
    PredictMessage,
    PredictReply,
    cancelled_key,
)

log = logging.getLogger(__name__)

#: Interval of looks for cancelled requests, and after one that failed.
POLL_SECONDS = 0.25
_RETRY_SECONDS = 5.0


class RequestAbandoned(Exception):
    """Nobody waits for the request: its deadline has passed or its client has gone."""


class Requests:
    """The requests that are being answered. Safe to use from many threads."""

    def __init__(
        self,
        redis: Redis,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._active: set[str] = set()
        self._cancelled: set[str] = set()
        self._is_ending = False
        self._next_poll = clock()

    def close(self) -> None:
        self._redis.close()

    def answer(
        self, message: PredictMessage | GenerateMessage, handler: Callable[[ActiveRequest], None]
    ) -> bool:
        """Calls `handler` with the request; its log lines have the request's id.

        An exception of the handler becomes the reply; those that are neither the client's fault nor a known failure are
        raised again. After a failure of the device the worker shuts down. Returns False for a request that is or
        becomes abandoned, which gets no reply.
        """
        request = ActiveRequest(message, self)
        request_id = message["request_id"]
        with self._lock:
            self._active.add(request_id)
        try:
            request.check_active()
            with bound(request_id=request_id):
                handler(request)
        except RequestAbandoned:
            log.info("request %s was abandoned", request_id)
            return False
        except (EngineError, StoreError) as error:
            request.fail(_fault(error))
        except Exception as error:
            request.fail(
                PredictFault(status=500, code="internal_error", message="the worker failed", param=None)
            )
            if is_device_failure(error):
                self._end_process()
            raise
        finally:
            with self._lock:
                self._active.discard(request_id)
                self._cancelled.discard(request_id)
        return True

    def _end_process(self) -> None:
        """Shuts this worker down in order, once: whoever supervises it starts it again."""
        with self._lock:
            is_first, self._is_ending = not self._is_ending, True
        if is_first:
            log.error("the device has failed: this worker ends, and needs a new process to go on")
            os.kill(os.getpid(), signal.SIGTERM)

    def is_active(self, message: PredictMessage | GenerateMessage) -> bool:
        """Returns whether a request's client still waits; a client that goes is noticed within POLL_SECONDS."""
        now = self._wall_clock()
        if now > message["deadline"]:
            return False
        if now - message["sent_at"] >= POLL_SECONDS:
            self._poll()
        return message["request_id"] not in self._cancelled

    def push(self, reply_to: str, reply: PredictReply | GenerateReply) -> None:
        """Appends a reply to a Redis list. Raises ValueError for NaN, which is not JSON."""
        payload = json.dumps(reply, allow_nan=False)
        try:
            with self._redis.pipeline() as pipe:
                pipe.rpush(reply_to, payload)
                pipe.expire(reply_to, REPLY_SECONDS)
                pipe.execute()
        except RedisError as error:
            log.warning("no reply to %s, the broker does not answer: %s", reply["request_id"], error)

    def _poll(self) -> None:
        if self._clock() < self._next_poll or not self._polling.acquire(blocking=False):
            return
        try:
            with self._lock:
                active = list(self._active)
            marks = cast("list[Any]", self._redis.mget([cancelled_key(request_id) for request_id in active]))
            cancelled = {id for id, mark in zip(active, marks, strict=True) if mark is not None}
            with self._lock:
                self._cancelled |= cancelled & self._active
            self._next_poll = self._clock() + POLL_SECONDS
        except RedisError as error:
            log.warning("cancelled requests are not known, the broker does not answer: %s", error)
            self._next_poll = self._clock() + _RETRY_SECONDS
        finally:
            self._polling.release()


class ActiveRequest:
    """One request that is being answered."""

    def __init__(self, message: PredictMessage | GenerateMessage, requests: Requests) -> None:
        self._message = message
        self._requests = requests

    def is_active(self) -> bool:
        """Returns whether the client still waits."""
        return self._requests.is_active(self._message)

    def check_active(self) -> None:
        """Raises RequestAbandoned if the client does not wait any more."""
        if not self.is_active():
            raise RequestAbandoned

    def reply(self, reply: PredictReply | GenerateReply) -> None:
        self._requests.push(self._message["reply_to"], reply)

    def fail(self, fault: PredictFault) -> None:
        self.reply(PredictReply(request_id=self._message["request_id"], error=fault))


def _fault(error: EngineError | StoreError) -> PredictFault:
    """Returns the API's answer to an error: 4xx for the client's, 5xx for ours."""
    if isinstance(error, RowError | ConfigError):
        code = "invalid_value" if error.code == type(error).code else error.code
        return PredictFault(status=400, code=code, message=error.message, param=error.param)
    if isinstance(error, ModelError):
        return PredictFault(status=404, code=error.code, message=error.message, param="model")
    status = 503 if isinstance(error, Unavailable | Overloaded) else 500
    return PredictFault(status=status, code=error.code or "internal_error", message=error.message, param=None)
