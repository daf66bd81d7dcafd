"""What a route may ask for: who calls, the database, the bytes, the workers. `api.app` makes all of it."""

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
from api.metrics_page import Scrape
from store import keys
from store.errors import Unauthenticated
from store.messages.hints import Hints
from store.settings import StoreSettings
from store.storage.artifacts import Artifacts


@dataclass(frozen=True, kw_only=True)
class Services:
    """What one API process holds for as long as it runs."""

    settings: StoreSettings
    database: Database
    artifacts: Artifacts
    hints: Hints
    predict: PredictClient
    admission: Admission
    texts: TextClient
    text_admission: Admission  #: its own: texts take as many seconds as other answers milliseconds
    scrape: Scrape


async def get_services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def _database(services: ServicesDep) -> Database:
    return services.database


Db = Annotated[Database, Depends(_database)]

bearer = HTTPBearer(auto_error=False, description="An API key: `heft keys create` makes one.")


async def given_key(credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> str:
    """The key that was sent, whosever it is."""
    if credentials is None:
        raise Unauthenticated("send an API key: Authorization: Bearer <key>")
    return credentials.credentials


#: For a route that learns whose key it is with what it looks up, in one transaction (`models.authorize`).
Key = Annotated[str, Depends(given_key)]


async def authenticated(db: Db, key: Key) -> keys.Owner:
    """Whose key it is. A dependency of routes: it runs before a byte of an upload is read."""
    return await db(keys.authenticate, key)


Caller = Annotated[keys.Owner, Depends(authenticated)]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key and body make one thing.",
    ),
]

Limit = Annotated[int, Query(ge=1, le=100, description="Items on a page.")]
After = Annotated[str | None, Query(max_length=300, description="The last id of the page before this one.")]


def body_hash(body: Any) -> str:
    """SHA-256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
