"""Changes to a study's row, and its events, numbered by it. It does NOT know what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from store import ids
from store.db.study_tables import Study, StudyEvent


def write(session: Session, study_id: str, **values: Any) -> None:
    """Change a study whose row this transaction has locked."""
    session.execute(update(Study).where(Study.id == study_id).values(values))


def append_event(
    session: Session,
    study_id: str,
    code: str,
    message: str,
    data: Mapping[str, Any] | None = None,
    level: str = "info",
) -> None:
    """Number and add an event; the study's row orders them."""
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
