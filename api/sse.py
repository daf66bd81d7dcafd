"""Generated text as server-sent events, as in OpenAI's API: one JSON object per event, then `[DONE]`.

An error in mid-stream is an event with OpenAI's error object.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack

from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from api.clients.generate import Replies
from api.clients.predict import WorkerError
from api.errors import error_response
from store.errors import Unavailable
from store.messages.generate import GenerateReply

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15


class TextStream(EventSourceResponse):
    """Streams the chunks of replies.

    `first`: the first reply, awaited before the stream starts, so that an error before it has its own status.
    `until_end`: closed when the stream ends.
    """

    def __init__(
        self,
        replies: Replies,
        first: GenerateReply | None,
        chunks: Callable[[GenerateReply], Iterable[BaseModel]],
        until_end: ExitStack,
    ) -> None:
        super().__init__(_events(replies, first, chunks), ping=HEARTBEAT_SECONDS, sep="\n")
        self._replies = replies
        self._until_end = until_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._until_end:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._replies.close()


async def _events(
    replies: Replies, first: GenerateReply | None, chunks: Callable[[GenerateReply], Iterable[BaseModel]]
) -> AsyncIterator[ServerSentEvent]:
    reply = first
    try:
        while reply is not None:
            for chunk in chunks(reply):
                yield ServerSentEvent(data=chunk.model_dump_json(exclude_unset=True), sep="\n")
            reply = await replies.next()
    except WorkerError as error:
        fault = error.fault
        answer = error_response(fault["status"], fault["message"], param=fault["param"], code=fault["code"])
        yield ServerSentEvent(data=bytes(answer.body).decode(), sep="\n")
        return
    except Unavailable as fault:
        answer = error_response(503, fault.message, code=fault.code)
        yield ServerSentEvent(data=bytes(answer.body).decode(), sep="\n")
        return
    yield ServerSentEvent(data="[DONE]", sep="\n")
