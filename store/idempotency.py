"""Idempotency keys: a POST that is sent twice creates one resource.

A key is reserved in the transaction that creates the resource. A second request with the same key waits in the INSERT
until that transaction has ended: if it was committed, the request gets the same resource; if it was rolled back, it
creates its own. Keys are stored for a week, longer than clients repeat a request.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.tables import IdempotencyKey
from store.errors import Conflict


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """`resource_id`: of the resource that the request shall create if `is_new`, else of the one that exists."""

    resource_id: str
    is_new: bool


def reserve(session: Session, *, owner_id: str, key: str, body_hash: str, resource_id: str) -> Reservation:
    """Reserves `key` for a new resource `resource_id`, or returns the resource that it was used for.

    Raises Conflict (code `idempotency_key_reused`) when the key was used with another body.
    """
    reservation = insert(IdempotencyKey).values(
        owner_id=owner_id, key=key, body_hash=body_hash, resource_id=resource_id
    )
    statement = reservation.on_conflict_do_nothing().returning(IdempotencyKey.resource_id)
    if session.scalar(statement) is not None:
        return Reservation(resource_id=resource_id, is_new=True)
    stored = session.scalars(
        select(IdempotencyKey).where(IdempotencyKey.owner_id == owner_id, IdempotencyKey.key == key)
    ).one()
    if stored.body_hash != body_hash:
        raise Conflict(
            "this Idempotency-Key was used with a different request",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return Reservation(resource_id=stored.resource_id, is_new=False)


def delete_old(session: Session, *, after_seconds: float = 7 * 86_400.0) -> None:
    """Deletes keys that are older than `after_seconds`."""
    old = IdempotencyKey.created_at < func.now() - seconds(after_seconds)
    session.execute(delete(IdempotencyKey).where(old))
