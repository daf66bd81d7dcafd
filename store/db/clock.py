"""Durations for the database's clock, the only clock that decides anything (leases, pauses, order)."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import BindParameter, Interval, literal


def seconds(value: float) -> BindParameter[timedelta]:
    """`value` seconds as a Postgres interval, to add to `now()`."""
    return literal(timedelta(seconds=value), Interval())
