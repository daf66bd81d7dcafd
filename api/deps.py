"""Dependencies of the routes: the caller, the database and the other services of the process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.admission import Admission
from api.clients.generate import TextClient
from api.clients.predict import PredictClient
from api.database import Database
from api.metrics_page import MetricsPage
from store import keys
from store.messages.hints import Hints
from store.settings import StoreSettings
from store.storage.artifacts import Artifacts


@dataclass(frozen=True, kw_only=True)
class Services:
    """The services of an API process, made by `api.app` for its lifetime."""

    settings: StoreSettings
    database: Database
    artifacts: Artifacts
    hints: Hints
    predict: PredictClient
    admission: Admission
    texts: TextClient
    text_admission: Admission  #: separate, because generated text takes a thousand times as long as labels
    metrics_page: MetricsPage


async def get_services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def _database(services: ServicesDep) -> Database:
    return services.database


Db = Annotated[Database, Depends(_database)]

bearer = HTTPBearer(auto_error=False, description="An API key: `heft keys create` makes one.")


async def get_caller(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> keys.Owner:
    """Returns the owner of the request's key. `api.door.keys` has authenticated it before the body was read.

    `bearer` is there for /openapi.json.
    """
    caller = request.state.caller
    assert isinstance(caller, keys.Owner)
    return caller


Caller = Annotated[keys.Owner, Depends(get_caller)]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Requests with the same key and body create one object.",
    ),
]

Limit = Annotated[int, Query(ge=1, le=100, description="Items per page.")]
After = Annotated[str | None, Query(max_length=300, description="The last id of the previous page.")]


def body_hash(body: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
