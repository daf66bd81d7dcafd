"""Requests for generated text: a Celery task out, any number of replies back through `api.clients.predict`.

A request whose client disconnects, or whose time is up, is cancelled and leaves its worker's batch.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from api.clients.predict import PredictClient, WorkerError, model_address
from store import models
from store.errors import Unavailable
from store.messages.broker import Task
from store.messages.generate import Constraint, GenerateMessage, GenerateReply, SamplingParams, ToolUse
from store.messages.predict import Intervention


class Replies:
    """The replies to one request, which is sent when the first one is awaited. `close` it at the end."""

    def __init__(self, client: PredictClient, message: GenerateMessage, timeout: float) -> None:
        self._client = client
        self._message = message
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._received: asyncio.Queue[GenerateReply] = asyncio.Queue()
        self._is_sent = self._is_over = False

    async def next(self) -> GenerateReply | None:
        """Returns the next reply; None after the last. Raises WorkerError, and Unavailable when the time is up."""
        if self._is_over:
            return None
        try:
            async with asyncio.timeout_at(self._deadline):
                if not self._is_sent:
                    self._is_sent = True
                    self._client.receivers[self._message["request_id"]] = self._received.put_nowait
                    await self._client.publish(Task.GENERATE, self._message)
                reply = await self._received.get()
        except TimeoutError as error:
            raise Unavailable(
                f"the text was not finished within {self._timeout:g} s: the model is still loading, the workers are "
                "busy, or the text is long: ask for fewer max_tokens",
                retry_after=5,
                code="model_not_ready",
            ) from error
        if "error" in reply:
            self._is_over = True
            raise WorkerError(reply["error"])
        self._is_over = "done" in reply
        return reply

    async def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._client.receivers.pop(self._message["request_id"], None)
        if self._is_sent and not self._is_over:
            self._is_over = True
            await asyncio.shield(self._client.cancel(self._message["request_id"]))


class TextClient:
    """Requests texts from the workers."""

    def __init__(self, client: PredictClient, *, timeout: float) -> None:
        self._client = client
        self._timeout = timeout

    def generate(
        self,
        request_id: str,
        model: models.Model,
        owner_id: str,
        inputs: list[dict[str, Any]],
        *,
        n: int,
        sampling_params: SamplingParams,
        stream: bool,
        intervention: Intervention,
        constraint: Constraint | None = None,
        tool_use: ToolUse | None = None,
        echo: bool = False,
    ) -> Replies:
        """Returns the replies to a request for `n` texts to each input, each of which matches `constraint`.

        `request_id` is unique.
        """
        now = time.time()
        message = GenerateMessage(
            request_id=request_id,
            model=model_address(model, owner_id),
            inputs=inputs,
            n=n,
            wish=sampling_params,
            stream=stream,
            constraint=constraint,
            tool_use=tool_use,
            echo=echo,
            intervention=intervention,
            sent_at=now,
            deadline=now + self._timeout,
            reply_to=self._client.reply_to,
        )
        return Replies(self._client, message, self._timeout)
