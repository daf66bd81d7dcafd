"""Checks the Host header, so that a page of another site can't reach the service under a name of its own.

Starlette's TrustedHostMiddleware decides; the refusal is the API's error object. Requests to the address that the
connection came to are accepted under any setting: no foreign name leads there.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from store.settings import StoreSettings

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def allowed_hosts(settings: StoreSettings) -> list[str]:
    """Returns the names that requests may use: those of HEFT_ALLOWED_HOSTS, loopback's, and HEFT_HOST."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return [*settings.allowed_host_names, *_LOOPBACK, host]


class HostMiddleware:
    """Answers 400 to requests for other hosts."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str]) -> None:
        self.app = app
        self.trusted = TrustedHostMiddleware(_accept, allowed_hosts=hosts, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or await self._is_allowed(scope, receive):
            await self.app(scope, receive, send)
            return
        message = "the Host header names another host: HEFT_ALLOWED_HOSTS lists the names of this service"
        await error_response(400, message, code="host_not_allowed")(scope, receive, send)

    async def _is_allowed(self, scope: Scope, receive: Receive) -> bool:
        if _names_own_address(scope):
            return True
        sent: list[int] = []

        async def record(message: Message) -> None:
            sent.append(message.get("status", 0))

        await self.trusted(scope, receive, record)
        return sent == []


async def _accept(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends nothing: the host is allowed."""


def _names_own_address(scope: Scope) -> bool:
    """Returns whether the Host header is the address that the connection came to."""
    address, port = scope.get("server") or ("", None)
    literal = f"[{address}]" if ":" in address else address
    return address != "" and Headers(scope=scope).get("host") in (literal, f"{literal}:{port}")
