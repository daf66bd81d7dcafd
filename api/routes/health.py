"""Does this process live, and can it work? Asked by supervisors and load balancers, without a key."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.deps import Db, ServicesDep
from migrations import is_current
from store.errors import Unavailable

router = APIRouter(tags=["Operations"])


class Health(BaseModel):
    status: str = "ok"


@router.get("/healthz")
async def live() -> Health:
    """The process lives. Says nothing of anything else."""
    return Health()


@router.get("/readyz")
async def ready(db: Db, services: ServicesDep) -> Health:
    """Database and broker answer, and the tables are those of this code. Otherwise 503, with the reason."""
    if not await db(_has_current_tables):
        raise Unavailable("the database does not have the tables of this version: run `heft migrate`")
    if not await services.predict.broker_answers():
        raise Unavailable("the message broker does not answer")
    return Health()


def _has_current_tables(session: Session) -> bool:
    engine = session.get_bind()
    assert isinstance(engine, Engine)
    return is_current(engine)
