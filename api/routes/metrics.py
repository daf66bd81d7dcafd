"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Security
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.deps import ServicesDep, bearer

router = APIRouter(tags=["Operations"])

_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/metrics", dependencies=[Security(bearer)], response_class=Response, responses=_TEXT)
async def metrics(services: ServicesDep) -> PlainTextResponse:
    """Prometheus metrics of this API process, jobs and workers. Needs a key, except on this machine."""
    return PlainTextResponse(await services.metrics_page.render(), media_type=CONTENT_TYPE_LATEST)
