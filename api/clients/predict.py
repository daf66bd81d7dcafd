"""Questions to the inference workers: out as a Celery task, back over one Redis list for this whole process.

One listener serves every waiting request: 45 synchronous routes that each waited for their own reply delayed
all others by 5 s. A request that nobody answers in time ends here, whatever became of its message.
It does NOT know models or rows; see `store.messages.predict` for the two messages.
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
from store.errors import Unavailable
from store.messages.broker import Task, redis_py_url
from store.messages.generate import GenerateMessage, GenerateReply
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

#: How long the listener blocks before it asks again, and rests when the broker is away.
_BLOCK_SECONDS = 5
_REST_SECONDS = 0.5
#: Publishing gives up after the broker's 3 s socket timeout; this is the thread's own end of patience.
_PUBLISH_SECONDS = 4.0
_CANCEL_SECONDS = 1.0


class Refused(Exception):
    """A worker's refusal, as it is to be answered."""

    def __init__(self, fault: PredictFault) -> None:
        super().__init__(fault["message"])
        self.fault = fault


class PredictClient:
    """Starts its listener in `start`, inside the event loop that will wait; `close` ends it."""

    def __init__(self, celery: Celery, redis_url: str, *, timeout: float) -> None:
        self._celery = celery
        self.redis = Redis.from_url(redis_py_url(redis_url), socket_timeout=_BLOCK_SECONDS + 5)
        self._timeout = timeout
        self.reply_to = f"heft:predict:{uuid.uuid4().hex}"
        self._waiting: dict[str, asyncio.Future[PredictReply]] = {}
        #: Who takes the replies to requests that get several (api.clients.generate).
        self.streams: dict[str, Callable[[GenerateReply], None]] = {}
        self._publishers = ThreadPoolExecutor(8, thread_name_prefix="predict-publish")
        self._listener: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._listener = asyncio.create_task(self._listen(), name="predict-replies")

    async def close(self) -> None:
        if self._listener is not None:
            await cancel_and_wait(self._listener)
        self._publishers.shutdown(wait=False, cancel_futures=True)
        await self.redis.aclose()

    async def ask(
        self, request_id: str, model: PredictModel, inputs: list[dict[str, Any]], intervention: Intervention
    ) -> list[PredictedRow]:
        """The answers to `inputs`, in their order. `request_id` is no other request's.

        Raises Refused with the worker's reason, and Unavailable when no worker has answered in time. Cancelled, it
        tells the workers.
        """
        now = time.time()
        message = PredictMessage(
            request_id=request_id,
            model=model,
            inputs=inputs,
            intervention=intervention,
            sent_at=now,
            deadline=now + self._timeout,
            reply_to=self.reply_to,
        )
        try:
            return await self._answers(message)
        except asyncio.CancelledError:
            await self.cancel(request_id)
            raise

    async def cancel(self, request_id: str) -> None:
        """Tell the workers that nobody waits for this request any more. A broker that is away is no fault."""
        try:
            async with asyncio.timeout(_CANCEL_SECONDS):
                await self.redis.set(cancelled_key(request_id), 1, ex=CANCELLED_SECONDS)
        except (RedisError, OSError, TimeoutError) as fault:
            log.info("%s is not known to be cancelled: %s", request_id, fault)

    async def _answers(self, message: PredictMessage) -> list[PredictedRow]:
        request_id = message["request_id"]
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timeout):
                await self.publish(Task.PREDICT, message)
                reply = await future
        except TimeoutError as fault:
            raise Unavailable(
                "no worker has answered in time: the model is still loading, or every worker is busy",
                retry_after=5,
                code="model_not_ready",
            ) from fault
        finally:
            del self._waiting[request_id]
        if "error" in reply:
            raise Refused(reply["error"])
        answers: list[PredictedRow] = reply["ok"]["data"]
        return answers

    async def broker_answers(self) -> bool:
        """Whether the broker answers a ping within 2 s."""
        try:
            async with asyncio.timeout(2):
                await self.redis.ping()
        except (RedisError, OSError):
            return False
        return True

    async def publish(self, task: Task, message: PredictMessage | GenerateMessage) -> None:
        """Raises Unavailable when the broker does not take it."""
        loop = asyncio.get_running_loop()
        sending = loop.run_in_executor(self._publishers, self._send, task, message)
        try:
            await asyncio.wait_for(sending, _PUBLISH_SECONDS)
        except (OperationalError, OSError, TimeoutError) as fault:
            raise Unavailable("the message broker does not answer") from fault

    def _send(self, task: Task, message: PredictMessage | GenerateMessage) -> None:
        self._celery.send_task(task.value, args=[message], retry=False)

    async def _listen(self) -> None:
        """Hands each reply to whoever waits for it; a reply that came too late has nobody and is dropped."""
        is_away = False
        while True:
            try:
                popped = await self.redis.blpop([self.reply_to], timeout=_BLOCK_SECONDS)
            except (RedisError, OSError) as fault:
                if not is_away:
                    log.warning("the reply listener lost the broker and goes on trying: %s", fault)
                is_away = True
                await asyncio.sleep(_REST_SECONDS)
                continue
            is_away = False
            if popped is not None:
                self._resolve(popped[1])

    def _resolve(self, payload: bytes | str) -> None:
        try:
            reply = json.loads(payload)
            stream = self.streams.get(reply["request_id"])
            waiting: asyncio.Future[PredictReply] | None = self._waiting.get(reply["request_id"])
        except (ValueError, TypeError, KeyError):
            log.error("a reply that is none: %.200r", payload)
            return
        if stream is not None:
            stream(reply)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)
