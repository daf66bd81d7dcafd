"""Keyset pagination in the manner of OpenAI's lists: `limit` items after the one named `after`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import Select, tuple_
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
    query: Select[T],
    *,
    by: tuple[InstrumentedAttribute[Any], ...],
    cursor: tuple[Any, ...] | None,
    limit: int,
    order: Order = "desc",
) -> Page[T]:
    """Returns the items of `query`, ordered by the columns `by`, after the one whose values of `by` are `cursor`.

    A keyset instead of an offset: rows that arrive or go between two pages shift nothing.
    """
    if cursor is not None:
        keyset = tuple_(*by)
        query = query.where(keyset < cursor if order == "desc" else keyset > cursor)
    ordered = query.order_by(*(column.desc() if order == "desc" else column.asc() for column in by))
    rows = list(session.scalars(ordered.limit(limit + 1)))
    return Page(items=rows[:limit], has_more=len(rows) > limit)


def cursor_of(session: Session, query: Select[*tuple[Any, ...]], after: str | None) -> tuple[Any, ...] | None:
    """Returns the keyset values of the item named `after`, which `query` selects; None when `after` is None.

    Raises InvalidRequest when there is no such item.
    """
    if after is None:
        return None
    row = session.execute(query).one_or_none()
    if row is None:
        raise InvalidRequest(f"after: there is no item {after!r}", param="after")
    return tuple(row)
