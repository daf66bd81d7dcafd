"""Exception handlers: every error becomes OpenAI's error object with all four keys.

Domain errors come from `store.errors`, malformed requests from FastAPI, unknown paths from Starlette. Any other
exception becomes a 500 in `api.middleware` that reveals nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from api.clients.predict import WorkerError
from api.rate_limits import RateLimit
from api.schemas.common import dotted
from store import errors

STATUS: dict[type[errors.StoreError], int] = {
    errors.InvalidRequest: 400,
    errors.WrongState: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.RateLimited: 429,
    errors.Unavailable: 503,
}

#: Types that are neither `invalid_request_error` nor `server_error`.
TYPES = {
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
}

#: Default codes, for responses without a domain error.
CODES = {
    400: "invalid_request",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}

#: OpenAI's codes for pydantic's error types.
VALIDATION_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}

#: A name in the request may be longer; an error repeats so much of it.
_MAX_PARAM_CHARS = 300


class ErrorDetail(BaseModel):
    """An error. `type` tells errors of the request from errors of the service; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Returns OpenAI's error object, with the headers that the status requires."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    detail = ErrorDetail(message=message, type=kind, param=param, code=code or CODES.get(status))
    response = JSONResponse(ErrorBody(error=detail).model_dump(), status_code=status, headers=headers)
    if status == 401:
        response.headers.setdefault("WWW-Authenticate", "Bearer")
    if status == 409:
        response.headers["x-should-retry"] = "false"  # the openai package retries a 409 otherwise
    if status in (429, 503):
        response.headers.setdefault("Retry-After", "2")
    return response


def store_error_response(fault: errors.StoreError) -> JSONResponse:
    """Returns the error object of a domain error."""
    status = next((STATUS[kind] for kind in type(fault).__mro__ if kind in STATUS), 500)
    headers: dict[str, str] = {}
    if isinstance(fault, errors.RateLimited):
        limit = RateLimit(limit=fault.limit, remaining=fault.remaining, reset_seconds=fault.retry_after)
        headers |= limit.headers()
    if isinstance(fault, errors.RateLimited | errors.Unavailable):
        headers["Retry-After"] = str(fault.retry_after)
    return error_response(status, fault.message, param=fault.param, code=fault.code, headers=headers)


async def on_store_error(_: Request, fault: errors.StoreError) -> JSONResponse:
    return store_error_response(fault)


async def on_http_error(request: Request, fault: HTTPException) -> JSONResponse:
    messages = {
        404: f"{request.method} {request.url.path} does not exist",
        405: f"{request.method} is not allowed for {request.url.path}",
    }
    message = messages.get(fault.status_code, fault.detail or HTTPStatus(fault.status_code).phrase)
    return error_response(fault.status_code, message, headers=fault.headers)


async def on_invalid_request(request: Request, fault: RequestValidationError) -> JSONResponse:
    faults = fault.errors()
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return error_response(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if isinstance(fault.body, bytes):
        return error_response(415, "the body must be JSON with Content-Type: application/json")
    param = _param(first, fault.body)
    reasons = [_reason(other) for other in faults if _param(other, fault.body) == param]
    message = "; ".join(dict.fromkeys(reasons))
    code = VALIDATION_CODES.get(first["type"], "invalid_value")
    return error_response(400, f"{param}: {message}" if param else message, param=param, code=code)


async def on_worker_error(_: Request, error: WorkerError) -> JSONResponse:
    fault = error.fault
    return error_response(fault["status"], fault["message"], param=fault["param"], code=fault["code"])


async def on_disconnect(_: Request, __: ClientDisconnect) -> JSONResponse:
    """The client disconnected while it was sending, so nobody reads this response."""
    return error_response(400, "the client disconnected before the body was complete")


def add_handlers(app: FastAPI) -> None:
    """Registers the handlers."""
    app.add_exception_handler(errors.StoreError, on_store_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_invalid_request)  # type: ignore[arg-type]
    app.add_exception_handler(WorkerError, on_worker_error)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, on_disconnect)  # type: ignore[arg-type]


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "unknown field"
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be an object"
    if fault["type"] == "missing":
        return "required field"
    return str(fault["msg"]).removeprefix("Value error, ")


def _param(fault: Mapping[str, Any], body: Any) -> str | None:
    """Returns the path of the field at fault, `method.heft.lora.rank`, without the tags that unions add."""
    path = fault.get("ctx", {}).get("path")
    if path is None:
        source, *parts = fault["loc"]
        steps = _steps(parts, body, missing=fault["type"] == "missing") if source == "body" else parts
        path = dotted(steps)
    return str(path)[:_MAX_PARAM_CHARS] or None


def _steps(parts: Sequence[str | int], body: Any, *, missing: bool) -> list[str | int]:
    steps: list[str | int] = []
    for part in parts:
        is_key = isinstance(body, dict) and part in body
        is_index = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_key or is_index:
            body = body[part]
            steps.append(part)
        # else: a union's tag, not a part of the request
    if missing and parts:
        steps.append(parts[-1])
    return steps
