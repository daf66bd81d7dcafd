"""Requests for text to the inference workers: out as a Celery task, back as any number of replies.

They come over the list that `api.clients.predict` listens on. A request whose client goes away, or whose time is over,
is marked as cancelled, and its text leaves the worker's batch. It does NOT know OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from api.clients.predict import PredictClient, Refused
from store.errors import Unavailable
from store.messages.broker import Task
from store.messages.generate import GenerateMessage, GenerateReply, SamplingParams
from store.messages.predict import Intervention, PredictModel


class Replies:
    """What comes back for one request, which is sent when the first reply is waited for. `close` it then."""

    def __init__(self, client: PredictClient, message: GenerateMessage, timeout: float) -> None:
        self._client = client
        self._message = message
        self._timeout = timeout
        self._ends_at = asyncio.get_running_loop().time() + timeout
        self._arrived: asyncio.Queue[GenerateReply] = asyncio.Queue()
        self._is_sent = self._is_over = False

    async def next(self) -> GenerateReply | None:
        """The next reply; None after the last.

        Raises Refused with the worker's reason, and Unavailable when the time is over.
        """
        if self._is_over:
            return None
        try:
            async with asyncio.timeout_at(self._ends_at):
                if not self._is_sent:
                    self._is_sent = True
                    self._client.streams[self._message["request_id"]] = self._arrived.put_nowait
                    await self._client.publish(Task.GENERATE, self._message)
                reply = await self._arrived.get()
        except TimeoutError as fault:
            raise Unavailable(
                f"the answer was not written within {self._timeout:g} s: the model is still loading, the workers are "
                "busy, or it is long: ask for fewer max_tokens",
                retry_after=5,
                code="model_not_ready",
            ) from fault
        if "error" in reply:
            self._is_over = True
            raise Refused(reply["error"])
        self._is_over = "done" in reply
        return reply

    async def close(self) -> None:
        """Nobody waits any more; the workers are told if they may still be writing."""
        self._client.streams.pop(self._message["request_id"], None)
        if self._is_sent and not self._is_over:
            self._is_over = True
            await asyncio.shield(self._client.cancel(self._message["request_id"]))


class TextClient:
    """Sends requests for text."""

    def __init__(self, client: PredictClient, *, timeout: float) -> None:
        self._client = client
        self._timeout = timeout

    def ask(
        self,
        request_id: str,
        model: PredictModel,
        inputs: list[dict[str, Any]],
        *,
        n: int,
        wish: SamplingParams,
        stream: bool,
        intervention: Intervention,
    ) -> Replies:
        """`request_id` is no other request's."""
        now = time.time()
        message = GenerateMessage(
            request_id=request_id,
            model=model,
            inputs=inputs,
            n=n,
            wish=wish,
            stream=stream,
            intervention=intervention,
            sent_at=now,
            deadline=now + self._timeout,
            reply_to=self._client.reply_to,
        )
        return Replies(self._client, message, self._timeout)
