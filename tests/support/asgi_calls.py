"""Calls of an ASGI application without a server, to see which messages it receives and sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope


def scope_of(method: str, path: str, headers: dict[str, str] | None = None, host: str = "192.0.2.1") -> Scope:
    """Returns the scope of a request from `host`, to the service's own name."""
    named = {"host": "localhost", **(headers or {})}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in named.items()],
        "client": (host, 1234),
        "server": ("localhost", 80),
        "state": {},
    }


@dataclass
class Exchange:
    """A request's body, in chunks, and its response. `received`: the chunks that the application took."""

    chunks: Sequence[bytes] = ()
    hangs: bool = False  #: the client sends nothing after the chunks, and does not end the body
    received: int = 0
    sent: list[Message] = field(default_factory=list)

    def run(self, app: ASGIApp, scope: Scope) -> Exchange:
        asyncio.run(self._call(app, scope))
        return self

    async def _call(self, app: ASGIApp, scope: Scope) -> None:
        messages = self._messages()

        async def receive() -> Message:
            message = next(messages, None)
            if message is None:
                assert self.hangs, "the application waits for more than the body"
                await asyncio.Event().wait()
            assert message is not None
            self.received += 1
            return message

        async def send(message: Message) -> None:
            self.sent.append(message)

        await app(scope, receive, send)

    def _messages(self) -> Iterator[Message]:
        for number, chunk in enumerate(self.chunks, start=1):
            more_body = self.hangs or number < len(self.chunks)
            yield {"type": "http.request", "body": chunk, "more_body": more_body}

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> Headers:
        return Headers(raw=self.sent[0]["headers"])

    @property
    def error(self) -> dict[str, Any]:
        """The error object of the response, after checking its format."""
        body = json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        return dict(body["error"])
