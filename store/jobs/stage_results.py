"""Results of stages, by the engine's key (heft_engine.training.stage_cache), for later jobs of the same owner.

Each result is a copy, independent of models, jobs and files. A row is added after its bytes are durable, and deleted
after its bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from store.db.session import seconds
from store.db.tables import StageResult
from store.jobs.fence import Claim, lock

_DAY = 86_400.0


def find(session: Session, *, owner_id: str, keys: Sequence[str]) -> list[StageResult]:
    """Returns this owner's results for `keys`, up to the first key without one, and marks them as used now."""
    query = select(StageResult).where(
        StageResult.owner_id == owner_id, StageResult.key.in_(keys), StageResult.removed_at.is_(None)
    )
    newest = {row.key: row for row in session.scalars(query.order_by(StageResult.created_at))}
    results = [newest[key] for key in takewhile(newest.__contains__, keys)]
    used = StageResult.storage_key.in_([result.storage_key for result in results])
    session.execute(update(StageResult).where(used).values(last_used_at=func.now()))
    return results


def add(
    session: Session, claim: Claim, *, key: str, storage_key: str, manifest: Mapping[str, str], size: int
) -> None:
    """Adds a result of this attempt, in place of its owner's earlier one of this key. Raises LostFence."""
    lock(session, claim)
    _remove(session, (StageResult.owner_id == claim.owner_id) & (StageResult.key == key))
    session.add(
        StageResult(
            storage_key=storage_key,
            owner_id=claim.owner_id,
            key=key,
            job_id=claim.job_id,
            manifest=dict(manifest),
            bytes=size,
        )
    )
    session.flush()


def remove(session: Session, *, storage_key: str) -> None:
    """Removes a result, which is damaged."""
    _remove(session, StageResult.storage_key == storage_key)


def expire(session: Session, *, days: float, max_bytes: int) -> None:
    """Removes results unused for `days`, and the least recently used ones beyond `max_bytes` in all."""
    newest_first = (StageResult.last_used_at.desc(), StageResult.storage_key)
    running_total = func.sum(StageResult.bytes).over(order_by=newest_first)
    ranked = (
        select(StageResult.storage_key, StageResult.last_used_at, running_total.label("running_total"))
        .where(StageResult.removed_at.is_(None))
        .subquery()
    )
    too_old = ranked.c.last_used_at <= func.now() - seconds(days * _DAY)
    expired = select(ranked.c.storage_key).where(or_(too_old, ranked.c.running_total > max_bytes))
    _remove(session, StageResult.storage_key.in_(expired))


def _remove(session: Session, condition: ColumnElement[bool]) -> None:
    removed = update(StageResult).where(condition, StageResult.removed_at.is_(None))
    session.execute(removed.values(removed_at=func.now()))
