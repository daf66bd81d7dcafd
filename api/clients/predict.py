"""Requests to the inference workers: a Celery task out, replies back over one Redis list of this process.

One listener receives the replies of all requests; synchronous routes that each waited for their own delayed all others
by 5 s at 45 requests. A request without a reply ends with its timeout, whatever became of its message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api.cancellation import cancel_and_wait
from store import models
from store.errors import Unavailable
from store.messages.broker import Task, redis_py_url
from store.messages.generate import GenerateMessage
from store.messages.predict import (
    CANCELLED_SECONDS,
    Intervention,
    PredictedRow,
    PredictFault,
    PredictMessage,
    PredictModel,
    PredictReply,
    cancelled_key,
)

log = logging.getLogger(__name__)

#: Timeout of the listener's blocking pop, and its pause while the broker is away.
_POP_SECONDS = 5
_RETRY_SECONDS = 0.5
#: Celery's publishing gives up after the broker's socket timeout of 3 s.
_PUBLISH_SECONDS = 4.0
_CANCEL_SECONDS = 1.0
_PING_SECONDS = 2.0


class WorkerError(Exception):
    """A worker's error reply. The API answers with its status, code, message and param."""

    def __init__(self, fault: PredictFault) -> None:
        super().__init__(fault["message"])
        self.fault = fault


class PredictClient:
    """Sends requests and receives replies. `start` and `close` it in the event loop that awaits them."""

    def __init__(self, celery: Celery, redis_url: str, *, timeout: float) -> None:
        self._celery = celery
        self.redis = Redis.from_url(redis_py_url(redis_url), socket_timeout=_POP_SECONDS + 5)
        self._timeout = timeout
        self.reply_to = f"heft:predict:{uuid.uuid4().hex}"
        #: Called with each reply to a request, by request id.
        self.receivers: dict[str, Callable[[Any], None]] = {}
        self._publishers = ThreadPoolExecutor(8, thread_name_prefix="predict-publish")
        self._listener: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._listener = asyncio.create_task(self._listen(), name="predict-replies")

    async def close(self) -> None:
        if self._listener is not None:
            await cancel_and_wait(self._listener)
        self._publishers.shutdown(wait=False, cancel_futures=True)
        await self.redis.aclose()

    async def predict(
        self,
        request_id: str,
        model: models.Model,
        owner_id: str,
        inputs: list[dict[str, Any]],
        intervention: Intervention,
    ) -> list[PredictedRow]:
        """Returns the predictions for `inputs`, in their order. `request_id` is unique.

        Raises WorkerError, and Unavailable without a reply in time. When cancelled, it cancels the request.
        """
        now = time.time()
        message = PredictMessage(
            request_id=request_id,
            model=model_address(model, owner_id),
            inputs=inputs,
            intervention=intervention,
            sent_at=now,
            deadline=now + self._timeout,
            reply_to=self.reply_to,
        )
        future: asyncio.Future[PredictReply] = asyncio.get_running_loop().create_future()
        self.receivers[request_id] = lambda reply: None if future.done() else future.set_result(reply)
        try:
            async with asyncio.timeout(self._timeout):
                await self.publish(Task.PREDICT, message)
                reply = await future
        except TimeoutError as error:
            raise Unavailable(
                "no worker has answered in time: the model is still loading, or every worker is busy",
                retry_after=5,
                code="model_not_ready",
            ) from error
        except asyncio.CancelledError:
            await self.cancel(request_id)
            raise
        finally:
            del self.receivers[request_id]
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["ok"]["data"]

    async def publish(self, task: Task, message: PredictMessage | GenerateMessage) -> None:
        """Sends a task to the workers. Raises Unavailable when the broker does not accept it."""

        def send() -> None:
            self._celery.send_task(task.value, args=[message], retry=False)

        sending = asyncio.get_running_loop().run_in_executor(self._publishers, send)
        try:
            await asyncio.wait_for(sending, _PUBLISH_SECONDS)
        except (OperationalError, OSError, TimeoutError) as error:
            raise Unavailable("the message broker does not answer") from error

    async def cancel(self, request_id: str) -> None:
        """Marks a request as cancelled for the workers. Failures of the broker are ignored."""
        try:
            async with asyncio.timeout(_CANCEL_SECONDS):
                await self.redis.set(cancelled_key(request_id), 1, ex=CANCELLED_SECONDS)
        except (RedisError, OSError, TimeoutError) as error:
            log.info("%s could not be cancelled: %s", request_id, error)

    async def broker_answers(self) -> bool:
        """Returns whether the broker answers a ping."""
        try:
            async with asyncio.timeout(_PING_SECONDS):
                await self.redis.ping()
        except (RedisError, OSError):
            return False
        return True

    async def _listen(self) -> None:
        is_away = False
        while True:
            try:
                popped = await self.redis.blpop([self.reply_to], timeout=_POP_SECONDS)
            except (RedisError, OSError) as error:
                if not is_away:
                    log.warning("replies can't be received, the broker does not answer; retrying: %s", error)
                is_away = True
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            is_away = False
            if popped is not None:
                self._receive(popped[1])

    def _receive(self, payload: bytes | str) -> None:
        """Hands a reply to its receiver; a late one has none and is dropped."""
        try:
            reply = json.loads(payload)
            receiver = self.receivers.get(reply["request_id"])
        except (ValueError, TypeError, KeyError):
            log.error("malformed reply: %.200r", payload)
            return
        if receiver is not None:
            receiver(reply)


def model_address(model: models.Model, owner_id: str) -> PredictModel:
    """Returns what a worker needs to load a model without the database."""
    return PredictModel(
        id=model.id,
        owner=owner_id,
        kind=model.kind,
        base_model=model.base_model,
        storage_key=model.storage_key,
        manifest=dict(model.manifest) or None,
    )
