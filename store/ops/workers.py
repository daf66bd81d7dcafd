"""The rows of worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.tables import BaseModelRow, Worker

#: In the `info` of a training worker that has listed its base models.
LISTED = "base_models_listed"


def register(session: Session, *, worker_id: str, role: str, info: Mapping[str, Any]) -> None:
    """Adds a worker, or replaces the row of an earlier process with the same id. `role` is train or inference."""
    values = {"role": role, "info": dict(info)}
    restarted = {**values, "started_at": func.now(), "seen_at": func.now()}
    statement = insert(Worker).values({"id": worker_id, **values})
    session.execute(statement.on_conflict_do_update(index_elements=[Worker.id], set_=restarted))


def heartbeat(session: Session, *, worker_id: str) -> None:
    """Updates the time at which a worker was last seen."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(seen_at=func.now()))


def update_info(session: Session, *, worker_id: str, changes: Mapping[str, Any]) -> None:
    """Merges `changes` into a worker's `info`."""
    info = Worker.info.concat(dict(changes))
    session.execute(update(Worker).where(Worker.id == worker_id).values(info=info))


def unregister(session: Session, *, worker_id: str) -> None:
    """Deletes the row of a worker that ends in good order."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def list_workers(session: Session, *, role: str | None = None, seen_within: float = 60.0) -> list[Worker]:
    """Returns the workers, of one role or of both, that were seen within `seen_within` seconds, by id."""
    query = select(Worker).where(Worker.seen_at > func.now() - seconds(seen_within)).order_by(Worker.id)
    if role is not None:
        query = query.where(Worker.role == role)
    return list(session.scalars(query))


def training_machine(session: Session) -> dict[str, Any] | None:
    """Returns a running training worker's machine (heft_engine.config.run_file.MachineSettings), or None."""
    machines = (worker.info.get("machine") for worker in list_workers(session, role="train"))
    return next((machine for machine in machines if machine is not None), None)


def base_models_are_listed(session: Session) -> bool:
    """Returns True if base models are known, or if a running training worker has found none."""
    if session.scalar(select(BaseModelRow.id).limit(1)) is not None:
        return True
    return any(worker.info.get(LISTED) for worker in list_workers(session, role="train"))
