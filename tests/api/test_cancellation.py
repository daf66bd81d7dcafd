"""Tasks that lose a cancellation are cancelled again."""

from __future__ import annotations

import asyncio

import pytest

from api import cancellation


def test_a_task_that_loses_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's wait_for does so when its work is done in the same moment."""
    monkeypatch.setattr(cancellation, "_RETRY_SECONDS", 0.01)
    cancellations = 0

    async def forgetful() -> None:
        nonlocal cancellations
        while True:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                cancellations += 1
                if cancellations == 3:
                    raise

    async def run() -> None:
        task, done = asyncio.create_task(forgetful()), asyncio.create_task(asyncio.sleep(0))
        await asyncio.sleep(0)
        await asyncio.wait_for(cancellation.cancel_and_wait(task, done), 10)
        assert task.cancelled()

    asyncio.run(run())
    assert cancellations == 3
