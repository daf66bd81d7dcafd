"""What stages of jobs ended with, for later jobs of the same owner: found by the engine's key.

Each result is a copy of its own, so that models, jobs and files may go as they like. A row's bytes are durable before
it is written, and gone before it is. It does NOT know what a key is made of (heft_engine.training.stage_cache
does), nor touch bytes.
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
    """This owner's results under the first so many keys, up to the first that is not there. They count as used now."""
    query = select(StageResult).where(
        StageResult.owner_id == owner_id, StageResult.key.in_(keys), StageResult.removed_at.is_(None)
    )
    newest = {row.key: row for row in session.scalars(query.order_by(StageResult.created_at))}
    found = [newest[key] for key in takewhile(newest.__contains__, keys)]
    _set(
        session, StageResult.storage_key.in_([row.storage_key for row in found]), {"last_used_at": func.now()}
    )
    return found


def add(
    session: Session, claim: Claim, *, key: str, storage_key: str, manifest: Mapping[str, str], size: int
) -> None:
    """Record a result of this attempt, in place of what its owner had under this key. Raises LostFence."""
    lock(session, claim)
    before = (StageResult.owner_id == claim.owner_id) & (StageResult.key == key)
    _set(session, before & StageResult.removed_at.is_(None), {"removed_at": func.now()})
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


def forget(session: Session, *, storage_key: str) -> None:
    """Give up a result that turned out to be damaged."""
    _set(session, StageResult.storage_key == storage_key, {"removed_at": func.now()})


def expire(session: Session, *, days: float, max_bytes: int) -> None:
    """Give up what nobody has used for so many days, and what was used least recently beyond so many bytes."""
    newest_first = (StageResult.last_used_at.desc(), StageResult.storage_key)
    so_far = func.sum(StageResult.bytes).over(order_by=newest_first)
    ranked = (
        select(StageResult.storage_key, StageResult.last_used_at, so_far.label("bytes_so_far"))
        .where(StageResult.removed_at.is_(None))
        .subquery()
    )
    too_old = ranked.c.last_used_at <= func.now() - seconds(days * _DAY)
    given_up = select(ranked.c.storage_key).where(or_(too_old, ranked.c.bytes_so_far > max_bytes))
    _set(session, StageResult.storage_key.in_(given_up), {"removed_at": func.now()})


def _set(session: Session, where: ColumnElement[bool], values: dict[str, object]) -> None:
    session.execute(
        update(StageResult).where(where).values(values).execution_options(synchronize_session=False)
    )
