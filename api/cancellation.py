"""Cancelling asyncio tasks, and work that ends when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

#: Time for a task to clean up before it is cancelled again.
_RETRY_SECONDS = 2.0

T = TypeVar("T")


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits until they have ended.

    One `cancel` is not enough: Python 3.11's `asyncio.wait_for`, which redis-py sends through, loses a cancellation
    that comes in the moment its own work is done (cpython#86296). A loop that then goes on keeps the process from
    ending.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_RETRY_SECONDS)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`; cancels it and raises ClientDisconnect when the client disconnects.

    Starlette by itself lets a route run on when nobody is left to read its answer. The request's body must have been
    read.
    """
    working = asyncio.create_task(work)
    disconnecting = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([working, disconnecting], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await cancel_and_wait(working, disconnecting)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
