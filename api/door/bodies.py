"""Bounds of a request's body by route: bytes, a minimal rate at which it arrives, and depth and values of JSON.

All but uploads are received whole before their route runs, in one piece that the route then reads. Their memory is
shared among the owners of keys. A request without a key has no body: no route that is open to everybody reads one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.door.json_bounds import check_json
from api.errors import error_response, store_error_response
from store.errors import StoreError, TooLarge, Unavailable
from store.settings import StoreSettings

#: For routes that take no body. Some clients send `{}` all the same.
MAX_OTHER_BYTES = 64 * 1024
#: Beside its file, an upload has a few small fields and boundaries.
_FORM_BYTES = 256 * 1024

#: `/predict` takes 1,024 questions, each with up to 100 choices or several messages.
MAX_QUESTION_VALUES = 120_000
#: A study has up to 200 arms with settings of their own.
MAX_JOB_VALUES = 20_000


def announced_length(headers: Headers) -> int:
    """Returns the announced bytes of a body; 0 without a number, which the parser refuses by itself."""
    length = headers.get("content-length", "0")
    # int() takes 4,300 digits at most, and zeros in front count.
    return int(length.lstrip("0")[:20] or "0") if length.isdecimal() else 0


@dataclass(frozen=True, kw_only=True)
class BodyBounds:
    """The most that a route's body may be. `setting` raises `max_bytes`; None: it is fixed."""

    max_bytes: int
    max_values: int = 1_000
    setting: str | None = None
    param: str | None = None  #: the field that the body consists of
    is_streamed: bool = False  #: the route reads the body as it arrives


def bounds_by_route(settings: StoreSettings) -> dict[tuple[str, str], BodyBounds]:
    """Returns {(method, path): bounds} of the routes that take a body."""
    question = BodyBounds(
        max_bytes=settings.max_question_bytes,
        max_values=MAX_QUESTION_VALUES,
        setting="HEFT_MAX_QUESTION_BYTES",
    )
    job = BodyBounds(
        max_bytes=settings.max_job_bytes, max_values=MAX_JOB_VALUES, setting="HEFT_MAX_JOB_BYTES"
    )
    upload = BodyBounds(
        max_bytes=settings.max_file_bytes + _FORM_BYTES,
        setting="HEFT_MAX_FILE_BYTES",
        param="file",
        is_streamed=True,
    )
    return {
        ("POST", "/predict"): question,
        ("POST", "/v1/predict"): question,
        ("POST", "/v1/completions"): question,
        ("POST", "/v1/chat/completions"): question,
        ("POST", "/v1/fine_tuning/jobs"): job,
        ("POST", "/v1/studies"): job,
        ("POST", "/v1/files"): upload,
    }


@dataclass(frozen=True, kw_only=True)
class ArrivalRate:
    """The slowest that a body may arrive: after `grace_seconds`, at `bytes_per_second` on average.

    Only time that is spent waiting for the client counts, not that of a slow storage.
    """

    grace_seconds: float
    bytes_per_second: float

    def seconds(self, received: int) -> float:
        """Returns how long a client may be waited for in all, until more than `received` bytes are there."""
        return self.grace_seconds + received / self.bytes_per_second


class BodyMemory:
    """The bytes of all bodies in this process, from their arrival to the end of their requests.

    An owner's bodies may take as much as remains free beside them: half of the memory if nobody else has any, a third
    if one other takes all that it may, and so on. Some is always left for an owner who has none
    (dynamic thresholds, Choudhury and Hahne 1998, with alpha = 1).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held_bytes: Counter[str] = Counter()  #: by owner

    def take(self, owner_id: str, size: int) -> None:
        """Raises Unavailable if the owner's bodies would be larger than the memory that remains free."""
        if self.held_bytes[owner_id] + size > self.limit - self.held_bytes.total() - size:
            message = "the service is overloaded: the bodies of too many large requests are in its memory"
            raise Unavailable(message, code="overloaded")
        self.held_bytes[owner_id] += size

    def give_back(self, owner_id: str, size: int) -> None:
        self.held_bytes[owner_id] -= size
        if self.held_bytes[owner_id] <= 0:
            del self.held_bytes[owner_id]


class BodyMiddleware:
    """Refuses bodies beyond their route's bounds: 413 for size, 408 for slowness, 400 for depth; 503 for memory."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Mapping[tuple[str, str], BodyBounds],
        slowest: ArrivalRate,
        memory: BodyMemory,
    ) -> None:
        self.app = app
        self.routes = routes
        self.slowest = slowest
        self.memory = memory
        self.other = BodyBounds(max_bytes=MAX_OTHER_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = scope.get("state", {}).get("caller")
        if caller is None:
            await self.app(scope, receive, send)
            return
        bounds = self.routes.get((scope["method"], scope["path"]), self.other)
        body = _Body(receive, bounds, self.slowest, self.memory, caller.id)
        try:
            await self._respond(body, bounds, scope, send)
        finally:
            body.forget()

    async def _respond(self, body: _Body, bounds: BodyBounds, scope: Scope, send: Send) -> None:
        receive: Receive = body.receive
        try:
            body.check_length(Headers(scope=scope))
            if not bounds.is_streamed:
                content = await body.whole()
                check_json(content, max_values=bounds.max_values)
                receive = _replayed(content, receive)
        except StoreError as fault:
            await store_error_response(fault)(scope, receive, send)
        except HTTPException as fault:
            await error_response(fault.status_code, fault.detail, headers=fault.headers)(scope, receive, send)
        except ClientDisconnect:
            return
        else:
            await self.app(scope, receive, send)


class _Body:
    """A request's body, counted and timed while it is received."""

    def __init__(
        self,
        receive: Receive,
        bounds: BodyBounds,
        slowest: ArrivalRate,
        memory: BodyMemory,
        owner_id: str,
    ) -> None:
        self._receive = receive
        self._bounds = bounds
        self._slowest = slowest
        self._memory = memory
        self._owner_id = owner_id
        self._received = 0
        self._held_bytes = 0
        self._complete = False
        self._waited_seconds = 0.0

    def check_length(self, headers: Headers) -> None:
        """Raises TooLarge if the announced length is beyond the bounds."""
        if announced_length(headers) > self._bounds.max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """Returns the next message. Raises TooLarge, and HTTPException (408) for a body that arrives too slowly."""
        if self._complete:
            return await self._receive()  # the client's disconnection, at any time
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        try:
            async with asyncio.timeout(self._slowest.seconds(self._received) - self._waited_seconds):
                message = await self._receive()
        except TimeoutError:
            reason = "the body arrives too slowly: send it without pauses"
            raise HTTPException(408, reason, headers={"Connection": "close"}) from None
        self._waited_seconds += loop.time() - started_at
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received > self._bounds.max_bytes:
            raise self._too_large()
        return message

    async def whole(self) -> bytes:
        """Returns the whole body. Raises as `receive`, Unavailable for want of memory, ClientDisconnect."""
        chunks: list[bytes] = []
        while not self._complete:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            self._memory.take(self._owner_id, len(chunk))
            self._held_bytes += len(chunk)
            chunks.append(chunk)
        return b"".join(chunks)

    def forget(self) -> None:
        """Gives back the memory of a whole body."""
        self._memory.give_back(self._owner_id, self._held_bytes)
        self._held_bytes = 0

    def _too_large(self) -> TooLarge:
        bounds = self._bounds
        reason = f"{bounds.setting} allows" if bounds.setting else "this route takes"
        message = f"the body is larger than the {bounds.max_bytes:,} bytes that {reason}"
        return TooLarge(message, param=bounds.param)


def _replayed(content: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the content first, and then what comes after it: the client's disconnection."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replayed
