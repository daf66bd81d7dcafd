"""Predictions for many rows over HTTP: concurrent requests, answers in the order of the rows.

Requests that the service refuses because it is busy are retried after its Retry-After. A request that is too large, or
that repeatedly times out, is split in half.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx

from cli.client import error_message
from cli.errors import CommandError

Json = dict[str, Any]

#: Retries end when the service has answered nothing for this long.
RETRY_SECONDS = 600.0
_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 60.0
_BUSY = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row and the number of its line, from 1."""

    number: int
    row: Mapping[str, Any]


class BulkPredictor:
    """Sends rows in batches. `common`: the fields of every request besides its rows, such as the model."""

    def __init__(self, http: httpx.AsyncClient, common: Json, *, batch_size: int, requests: int) -> None:
        self._http = http
        self._common = common
        self._batch_size = batch_size
        self._semaphore = asyncio.Semaphore(requests)
        self._window = 2 * requests  #: answered batches may wait for a slow one before them
        self._answered_at = time.monotonic()

    async def answers(self, lines: Iterator[Line]) -> AsyncGenerator[list[Json]]:
        """Yields the answers of each batch, in order. Raises CommandError."""
        tasks: deque[asyncio.Task[list[Json]]] = deque()
        try:
            while True:
                while len(tasks) < self._window and (batch := list(islice(lines, self._batch_size))):
                    tasks.append(asyncio.create_task(self._predict(batch)))
                if not tasks:
                    return
                yield await tasks[0]
                tasks.popleft()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _predict(self, batch: Sequence[Line]) -> list[Json]:
        async with self._semaphore:
            return await self._predict_with_retries(batch)

    async def _predict_with_retries(self, batch: Sequence[Line]) -> list[Json]:
        timeouts = 0
        while True:
            try:
                response = await self._http.post(
                    "/v1/predict", json=self._common | {"inputs": [line.row for line in batch]}
                )
            except httpx.TransportError as error:
                await self._pause(f"{self._http.base_url} does not answer ({error})", _PAUSE_SECONDS)
                continue
            if response.status_code == 200:
                self._answered_at = time.monotonic()
                answers: list[Json] = response.json()["data"]
                return answers
            if response.status_code == 413 and len(batch) > 1:
                return await self._predict_halves(batch)
            if response.status_code not in _BUSY:
                raise CommandError(_error(response, batch))
            await self._pause(error_message(response), _retry_after(response))
            timeouts += _timed_out(response)
            # The first timeout may be due to loading the model.
            if timeouts > 1 and len(batch) > 1:
                return await self._predict_halves(batch)

    async def _predict_halves(self, batch: Sequence[Line]) -> list[Json]:
        half = len(batch) // 2
        first, second = batch[:half], batch[half:]
        return [*await self._predict_with_retries(first), *await self._predict_with_retries(second)]

    async def _pause(self, reason: str, seconds: float) -> None:
        """Raises CommandError if nothing was answered for too long."""
        if time.monotonic() - self._answered_at > RETRY_SECONDS:
            raise CommandError(f"the service answered nothing for {RETRY_SECONDS / 60:.0f} minutes: {reason}")
        # Jitter, so that requests that were refused together are not retried together.
        await asyncio.sleep(min(seconds, _MAX_PAUSE_SECONDS) * random.uniform(1.0, 1.25))


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return _PAUSE_SECONDS


def _timed_out(response: httpx.Response) -> bool:
    try:
        return bool(response.json()["error"]["code"] == "model_not_ready")
    except (ValueError, KeyError, TypeError):
        return False


def _error(response: httpx.Response, batch: Sequence[Line]) -> str:
    """Returns the error message, with the line number if it concerns one row."""
    message = error_message(response)
    try:
        param = response.json()["error"]["param"] or ""
    except (ValueError, KeyError, TypeError):
        param = ""
    if param.startswith("inputs["):
        index = int(param.removeprefix("inputs[").partition("]")[0])
        return f"line {batch[index].number}: {message}"
    if len(batch) == 1:
        return f"line {batch[0].number}: {message}"
    return message
