"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials
from prometheus_client import CONTENT_TYPE_LATEST

from api.deps import Db, ServicesDep, authenticated, bearer, given_key

router = APIRouter(tags=["Operations"])


async def allowed(
    request: Request, db: Db, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> None:
    """A caller on this machine, or one with a key."""
    if not is_local(request):
        await authenticated(db, await given_key(credentials))


def is_local(request: Request) -> bool:
    """Whether the caller is on this machine. What a proxy forwards comes from elsewhere."""
    if request.client is None or {"forwarded", "x-forwarded-for", "x-real-ip"} & set(request.headers):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/metrics", dependencies=[Depends(allowed)], response_class=Response, responses=_TEXT)
async def metrics(services: ServicesDep) -> PlainTextResponse:
    """Prometheus's text format: this API process, jobs, and every worker. Takes a key, or a caller on this machine."""
    return PlainTextResponse(await services.scrape(), media_type=CONTENT_TYPE_LATEST)
