"""The engine, sessions and transactions. It does NOT know any table.

Rows that a session returns are records to read: they stay readable after the transaction, every query reads
them fresh, and a change made to one in Python is refused. Rows change by guarded UPDATEs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import BindParameter, Engine, ExceptionContext, Interval, create_engine, event, exc, literal
from sqlalchemy.orm import Session, sessionmaker

from store.errors import Unavailable

_CONNECT_SECONDS = 3
_POOL_SECONDS = 3
_STATEMENT_MS = 4_000
_LOCK_MS = 3_000
#: An owner of a transaction that went to sleep in it must not hold its locks for ever.
_IDLE_MS = 30_000

#: SQLSTATE's class of values that can't be: "invalid input syntax for type integer: …".
_DATA_ERRORS = "22"

SessionFactory = sessionmaker[Session]


def make_engine(url: str, *, pool_size: int = 10) -> Engine:
    """An engine that gives up within seconds on a database that is away.

    These limits are the server's and the kernel's; a server that is frozen (not gone) can hold a socket for
    longer, so that routes need a deadline of their own.
    """
    engine = create_engine(
        url,
        pool_pre_ping=True,
        hide_parameters=True,  # an error's text goes into logs, and values are users' data
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=_POOL_SECONDS,
        connect_args={
            "application_name": "heft",
            "connect_timeout": _CONNECT_SECONDS,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 2,
            "tcp_user_timeout": 5_000,
            "options": f"-c statement_timeout={_STATEMENT_MS} -c lock_timeout={_LOCK_MS}"
            f" -c idle_in_transaction_session_timeout={_IDLE_MS} -c timezone=UTC",
        },
    )
    event.listen(engine, "handle_error", _without_values)
    return engine


def _without_values(context: ExceptionContext) -> None:
    """Postgres tells the whole row that broke a constraint, and the value that it could not read: users' data.

    What stays is the first line of what it says; `diag` of the original keeps the rest, for programs.
    """
    fault = context.original_exception
    if not isinstance(fault, psycopg.Error) or context.sqlalchemy_exception is None:
        return
    told = fault.diag.message_primary
    if told is None:
        return  # not the server's words: the connection's
    if (fault.sqlstate or "").startswith(_DATA_ERRORS):
        told = told.partition(":")[0]
    fault.args = (told,)
    context.sqlalchemy_exception.args = (f"({type(fault).__name__}) {told}",)


def session_factory(engine: Engine) -> SessionFactory:
    factory = sessionmaker(
        engine, expire_on_commit=False, autoflush=False, execution_options={"populate_existing": True}
    )
    event.listen(factory, "before_flush", _refuse_changed_rows)
    return factory


def _refuse_changed_rows(session: Session, _context: Any, _instances: Any) -> None:
    if session.dirty or session.deleted:
        raise RuntimeError("rows are records: they change by a guarded UPDATE in the store, not in Python")


@contextmanager
def transaction(factory: SessionFactory) -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any error. Raises Unavailable when the database
    is away, too slow, or gave this transaction up for another (deadlock, lock timeout).
    """
    try:
        with factory.begin() as session:
            yield session
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        raise Unavailable("the database does not answer just now; try again") from error
    except exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise Unavailable("the connection to the database was lost; try again") from error


def seconds(value: float) -> BindParameter[timedelta]:
    """A Postgres interval to add to `now()`: the database's clock alone decides leases, pauses and order."""
    return literal(timedelta(seconds=value), Interval())
