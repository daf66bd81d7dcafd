"""Liveness and readiness probes, without authentication."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.deps import Db, ServicesDep
from migrations import is_current
from store.errors import Unavailable
from store.ops import workers

router = APIRouter(tags=["Operations"])


class Health(BaseModel):
    status: str = "ok"


class Readiness(Health):
    """`coming`: parts that are not there yet, and what brings them. Requests that need one are refused until then."""

    coming: list[str]


@router.get("/healthz")
async def live() -> Health:
    """Liveness: the process responds. Checks nothing else."""
    return Health()


@router.get("/readyz")
async def ready(db: Db, services: ServicesDep) -> Readiness:
    """Readiness: database and broker respond, and migrations are current. Otherwise 503 with the reason."""
    if not await db(_is_migrated):
        raise Unavailable("the database schema is not current: run `heft migrate`")
    if not await services.predict.broker_answers():
        raise Unavailable("the message broker does not answer")
    is_listed = await db(workers.base_models_are_listed)
    return Readiness(
        coming=[] if is_listed else ["base models: a training worker lists those of its machine"]
    )


def _is_migrated(session: Session) -> bool:
    engine = session.get_bind()
    assert isinstance(engine, Engine)
    return is_current(engine)
