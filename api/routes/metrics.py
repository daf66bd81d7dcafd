"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials
from prometheus_client import CONTENT_TYPE_LATEST

from api.deps import Db, ServicesDep, bearer, get_api_key, get_caller

router = APIRouter(tags=["Operations"])


async def allowed(
    request: Request, db: Db, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> None:
    """Authorizes callers on this machine, and others with an API key."""
    if not is_local(request):
        await get_caller(db, await get_api_key(credentials))


def is_local(request: Request) -> bool:
    """Returns whether the caller is on this machine. Requests that a proxy forwards are not."""
    if request.client is None or {"forwarded", "x-forwarded-for", "x-real-ip"} & set(request.headers):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/metrics", dependencies=[Depends(allowed)], response_class=Response, responses=_TEXT)
async def metrics(services: ServicesDep) -> PlainTextResponse:
    """Prometheus metrics of this API process, jobs and workers. Needs a key, except on this machine."""
    return PlainTextResponse(await services.metrics_page.render(), media_type=CONTENT_TYPE_LATEST)
