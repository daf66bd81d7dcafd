"""The `x-ratelimit-*` headers of OpenAI's API, on successes and on 429."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

#: The headers in /openapi.json.
HEADERS: dict[str, Any] = {
    "x-ratelimit-limit-requests": {
        "description": "The inputs that may wait at the moment.",
        "schema": {"type": "integer"},
    },
    "x-ratelimit-remaining-requests": {
        "description": "Those of them that are left.",
        "schema": {"type": "integer"},
    },
    "x-ratelimit-reset-requests": {
        "description": "The time until all are left again, such as `1m7s`.",
        "schema": {"type": "string"},
    },
}


@dataclass(frozen=True, kw_only=True)
class RateLimit:
    """A limit that a request came under, in requests, or in inputs where one request may have many."""

    limit: int
    remaining: int
    reset_seconds: float  #: until `limit` remain, or on a refusal until the request may be sent again

    def headers(self) -> dict[str, str]:
        """Returns the headers of a response."""
        minutes, seconds = divmod(math.ceil(self.reset_seconds), 60)
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": f"{minutes}m{seconds}s" if minutes else f"{seconds}s",
        }
