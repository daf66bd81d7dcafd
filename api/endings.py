"""Tasks that end when they are told to. It does NOT know what they do."""

from __future__ import annotations

import asyncio
from typing import Any

#: Time for a task to clean up, before it is told again.
_AGAIN_SECONDS = 2.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel these tasks, and wait until they have ended.

    Once is not enough: Python 3.11's `asyncio.wait_for`, which redis-py sends through, forgets a cancellation that
    comes in the moment its own work is done (cpython#86296). A loop that then goes on keeps the process from ending.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
