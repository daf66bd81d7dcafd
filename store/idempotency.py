"""Idempotency keys: a POST sent twice makes one thing.

The reservation is made in the transaction that makes the thing. A second request with the same key waits in
the INSERT until that transaction has ended: committed, it gets the same thing; rolled back, it makes its own.
A key is remembered for a week, longer than anything repeats a request; then it is as good as new.
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
    """`resource_id` is what the request made, or is to make: only if `is_new`."""

    resource_id: str
    is_new: bool


def reserve(session: Session, *, owner_id: str, key: str, body_hash: str, resource_id: str) -> Reservation:
    """Reserve `key` for the thing about to be made under `resource_id`, or find what it was used for.

    Raises Conflict (code `idempotency_key_reused`) when the key was used with another body.
    """
    mine = insert(IdempotencyKey).values(
        owner_id=owner_id, key=key, body_hash=body_hash, resource_id=resource_id
    )
    statement = mine.on_conflict_do_nothing().returning(IdempotencyKey.resource_id)
    if session.scalar(statement) is not None:
        return Reservation(resource_id=resource_id, is_new=True)
    used = session.scalars(
        select(IdempotencyKey).where(IdempotencyKey.owner_id == owner_id, IdempotencyKey.key == key)
    ).one()
    if used.body_hash != body_hash:
        raise Conflict(
            "this Idempotency-Key was used with a different request",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return Reservation(resource_id=used.resource_id, is_new=False)


def forget_old(session: Session, *, after_seconds: float = 7 * 86_400.0) -> None:
    """Drop the keys that nobody will send again."""
    old = IdempotencyKey.created_at < func.now() - seconds(after_seconds)
    session.execute(delete(IdempotencyKey).where(old).execution_options(synchronize_session=False))
