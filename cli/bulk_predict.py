"""Many rows asked over HTTP: several requests under way, answers in the rows' order.

A service that is busy says when to come back and is asked again then; one that can't answer so many rows in its time
limit is asked for fewer. It does NOT read or write files, nor print.
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

from cli.client import message_of
from cli.errors import CommandError

Json = dict[str, Any]

#: The service may be away or busy for so long; what is answered by then stays.
PATIENCE_SECONDS = 600.0
_PAUSE_SECONDS = 1.0
_MOST_PAUSE_SECONDS = 60.0
_BUSY = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row, and where it stands in its file (from 1)."""

    number: int
    row: Mapping[str, Any]


class Bulk:
    """One run. `asked` is what every request holds besides its rows: model, intervention, abstain_below."""

    def __init__(self, http: httpx.AsyncClient, asked: Json, *, rows: int, requests: int) -> None:
        self._http = http
        self._asked = asked
        self._rows = rows
        self._turn = asyncio.Semaphore(requests)
        self._window = 2 * requests  #: answered requests may wait for a slow one before them
        self._answered_at = time.monotonic()

    async def answers(self, lines: Iterator[Line]) -> AsyncGenerator[list[Json]]:
        """The answers, request by request, in order. Raises CommandError."""
        under_way: deque[asyncio.Task[list[Json]]] = deque()
        try:
            while True:
                while len(under_way) < self._window and (block := list(islice(lines, self._rows))):
                    under_way.append(asyncio.create_task(self._ask(block)))
                if not under_way:
                    return
                yield await under_way[0]
                under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _ask(self, block: Sequence[Line]) -> list[Json]:
        async with self._turn:
            return await self._patiently(block)

    async def _patiently(self, block: Sequence[Line]) -> list[Json]:
        in_vain = 0
        while True:
            try:
                answer = await self._http.post(
                    "/v1/predict", json=self._asked | {"inputs": [line.row for line in block]}
                )
            except httpx.TransportError as error:
                await self._rest(f"{self._http.base_url} does not answer ({error})", _PAUSE_SECONDS)
                continue
            if answer.status_code == 200:
                self._answered_at = time.monotonic()
                found: list[Json] = answer.json()["data"]
                return found
            if answer.status_code not in _BUSY:
                raise CommandError(_refusal(answer, block))
            await self._rest(message_of(answer), _retry_after(answer))
            in_vain += _took_too_long(answer)
            # The first time, the model may only have been on its way.
            if in_vain > 1 and len(block) > 1:
                half = len(block) // 2
                return [*await self._patiently(block[:half]), *await self._patiently(block[half:])]

    async def _rest(self, reason: str, seconds: float) -> None:
        """Raises CommandError when nothing was answered for too long."""
        if time.monotonic() - self._answered_at > PATIENCE_SECONDS:
            raise CommandError(f"nothing was answered for {PATIENCE_SECONDS / 60:.0f} minutes: {reason}")
        # Those who were refused together shall not come back together.
        await asyncio.sleep(min(seconds, _MOST_PAUSE_SECONDS) * random.uniform(1.0, 1.25))


def _retry_after(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers["Retry-After"]))
    except (KeyError, ValueError):
        return _PAUSE_SECONDS


def _took_too_long(answer: httpx.Response) -> bool:
    try:
        return bool(answer.json()["error"]["code"] == "model_not_ready")
    except (ValueError, KeyError, TypeError):
        return False


def _refusal(answer: httpx.Response, block: Sequence[Line]) -> str:
    """The refusal, with the line where it is one row's."""
    message = message_of(answer)
    try:
        param = answer.json()["error"]["param"] or ""
    except (ValueError, KeyError, TypeError):
        param = ""
    if param.startswith("inputs["):
        index = int(param.removeprefix("inputs[").partition("]")[0])
        return f"line {block[index].number}: {message}"
    if len(block) == 1:
        return f"line {block[0].number}: {message}"
    return message
