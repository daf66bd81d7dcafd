"""Worker processes that have been seen. A worker writes its row at the start and with every heartbeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.tables import Worker


def register(session: Session, *, worker_id: str, role: str, info: Mapping[str, Any]) -> None:
    """Make a worker known, or known again under the id it had. `role` is train or inference."""
    row = {"id": worker_id, "role": role, "info": dict(info)}
    fresh = {"role": role, "info": dict(info), "started_at": func.now(), "seen_at": func.now()}
    session.execute(insert(Worker).values(row).on_conflict_do_update(index_elements=[Worker.id], set_=fresh))


def heartbeat(session: Session, *, worker_id: str) -> None:
    session.execute(update(Worker).where(Worker.id == worker_id).values(seen_at=func.now()))


def note(session: Session, *, worker_id: str, changes: Mapping[str, Any]) -> None:
    """Add to what a worker says of itself in `info`, or change it."""
    session.execute(
        update(Worker).where(Worker.id == worker_id).values(info=Worker.info.concat(dict(changes)))
    )


def forget(session: Session, *, worker_id: str) -> None:
    """A worker that ends in good order takes its row with it."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def list_workers(session: Session, *, role: str | None = None, seen_within: float = 60.0) -> list[Worker]:
    """Workers that wrote within the last `seen_within` seconds, by id."""
    query = select(Worker).where(Worker.seen_at > func.now() - seconds(seen_within)).order_by(Worker.id)
    if role is not None:
        query = query.where(Worker.role == role)
    return list(session.scalars(query))
