"""Changes of a study's row, and its events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from store import ids
from store.db.study_tables import Study, StudyEvent


def write(session: Session, study_id: str, **values: Any) -> None:
    """Changes a study whose row this transaction has locked."""
    session.execute(update(Study).where(Study.id == study_id).values(values))


def append_event(
    session: Session,
    study_id: str,
    code: str,
    message: str,
    data: Mapping[str, Any] | None = None,
    level: str = "info",
) -> None:
    """Adds an event, numbered by an UPDATE of the study's row, which also orders them."""
    statement = (
        update(Study)
        .where(Study.id == study_id)
        .values(event_seq=Study.event_seq + 1)
        .returning(Study.event_seq)
    )
    seq = session.execute(statement).scalar_one()
    session.add(
        StudyEvent(
            study_id=study_id,
            seq=seq,
            id=ids.new_study_event_id(),
            level=level,
            message=message,
            data={**(data or {}), "code": code},
        )
    )
    session.flush()
