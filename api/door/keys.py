"""Checks the API key of a request before any of its body is received. The one place that says which paths need a key.

Paths are closed unless they are named here, unknown ones too. The owner is then `request.state.caller`.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.deps import Services
from api.door.addresses import is_local
from api.door.wrong_keys import WrongKeys
from api.errors import store_error_response
from store import keys
from store.errors import StoreError, Unauthenticated

#: Probes, and the description of the API.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
#: The script and style of /docs, which come from no other site.
DOCS_FILES = "/docs/files"
#: Open to callers on this machine, such as a Prometheus beside the service.
LOCAL_PATHS = frozenset({"/metrics"})


def needs_key(scope: Scope) -> bool:
    """Returns whether a request needs an API key."""
    path = scope["path"]
    if path in OPEN_PATHS or path.startswith(f"{DOCS_FILES}/"):
        return False
    return not (path in LOCAL_PATHS and is_local(scope))


class KeyMiddleware:
    """Answers 401 to requests without a valid key, and 429 to a client that has sent too many wrong ones."""

    def __init__(self, app: ASGIApp, *, wrong_keys: WrongKeys) -> None:
        self.app = app
        self.wrong_keys = wrong_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and needs_key(scope):
            try:
                scope.setdefault("state", {})["caller"] = await self._authenticate(scope)
            except StoreError as fault:
                await store_error_response(fault)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> keys.Owner:
        """Returns the owner of the request's key. Raises Unauthenticated, RateLimited, or Unavailable."""
        key = bearer_key(Headers(scope=scope))
        host = scope["client"][0] if scope.get("client") else ""
        with self.wrong_keys.trying(host, key):
            keys.check_form(key)
            return await _services(scope).database(keys.authenticate, key)


def bearer_key(headers: Headers) -> str:
    """Returns the key of `Authorization: Bearer <key>`. Raises Unauthenticated without one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("an API key is required: Authorization: Bearer <key>")
    return key.strip()


def _services(scope: Scope) -> Services:
    app = scope["app"]
    assert isinstance(app, FastAPI)
    services = app.state.services
    assert isinstance(services, Services)
    return services
