"""Keyset pagination in the manner of OpenAI's lists: `limit` items after the one named `after`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from store.errors import InvalidRequest

T = TypeVar("T")
Order = Literal["asc", "desc"]


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    items: list[T]
    has_more: bool


def fetch_page(
    session: Session,
    items: Select[T],
    *conditions: ColumnElement[bool],
    by: tuple[InstrumentedAttribute[Any], ...],
    after: str | None,
    limit: int,
    order: Order = "desc",
) -> Page[T]:
    """Returns those of `items` that meet `conditions`, ordered by the columns `by`, after the one with the id `after`.

    A keyset instead of an offset: rows that arrive or go between two pages shift nothing. The item `after` need not
    meet the conditions (any more). Raises InvalidRequest (param `after`) when it is none of `items`.
    """
    query = items.where(*conditions)
    if after is not None:
        cursor = session.execute(items.with_only_columns(*by).where(by[0].class_.id == after)).one_or_none()
        if cursor is None:
            raise InvalidRequest(f"after: there is no item {after!r}", param="after")
        keyset = tuple_(*by)
        query = query.where(keyset < tuple(cursor) if order == "desc" else keyset > tuple(cursor))
    ordered = query.order_by(*(column.desc() if order == "desc" else column.asc() for column in by))
    rows = list(session.scalars(ordered.limit(limit + 1)))
    return Page(items=rows[:limit], has_more=len(rows) > limit)
