"""The errors of the service. `api.errors` alone maps them to HTTP.

StoreError              message, param (the invalid field), code (stable, for programs)
├── InvalidRequest      an invalid value                               → 400
├── WrongState          the state of a job, a study or an export forbids it          → 400
├── Unauthenticated     no API key, or an unknown one                  → 401
├── Forbidden           a valid key without permission                 → 403
├── NotFound            an unknown id, or another owner's              → 404
├── Conflict            a key was used for something else              → 409, never retried
├── TooLarge            more bytes, rows or inputs than allowed        → 413
├── RateLimited         too many requests                              → 429 with Retry-After and the limit
├── Unavailable         database, broker or workers do not answer      → 503 with Retry-After
├── Damaged             stored bytes are missing or differ from their SHA-256        → 500
└── LostFence           a worker's attempt is no longer the current one (never leaves the worker)
"""

from __future__ import annotations


class StoreError(Exception):
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(StoreError):
    code = "invalid_value"


class WrongState(StoreError):
    code = "wrong_state"


class Unauthenticated(StoreError):
    code = "invalid_api_key"


class Forbidden(StoreError):
    code = "permission_denied"


class NotFound(StoreError):
    """Only a model that is not found has a code, as in OpenAI's API."""


class Conflict(StoreError):
    code = "conflict"


class TooLarge(StoreError):
    code = "too_large"


class RateLimited(StoreError):
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, limit: int, remaining: int = 0, retry_after: int = 1) -> None:
        """limit: requests (or inputs of requests) that are allowed; remaining: of these, now."""
        super().__init__(message)
        self.limit = limit
        self.remaining = remaining
        self.retry_after = retry_after


class Unavailable(StoreError):
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: int = 2, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Damaged(StoreError):
    code = "artifact_damaged"


class LostFence(StoreError):
    code = "lost_fence"
