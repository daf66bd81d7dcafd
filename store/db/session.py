"""The SQLAlchemy engine, sessions and transactions.

Rows that a session returns are read-only records: they stay readable after the transaction, every query reads them
anew, and a change to one in Python is refused. Rows change by guarded UPDATEs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import BindParameter, Engine, ExceptionContext, Interval, create_engine, event, exc, literal
from sqlalchemy.orm import Session, sessionmaker

from store.db import storable
from store.errors import Unavailable

_CONNECT_SECONDS = 3
_POOL_SECONDS = 3
_STATEMENT_MS = 4_000
_LOCK_MS = 3_000
_IDLE_MS = 30_000  #: the longest that a client which sleeps inside a transaction holds its locks
#: SQLSTATE's class "data exception": "invalid input syntax for type integer: …".
_DATA_ERRORS = "22"

SessionFactory = sessionmaker[Session]


def make_engine(url: str, *, pool_size: int = 10) -> Engine:
    """Returns an engine that gives up within seconds on a database that does not answer.

    The server and the kernel enforce these limits. A server that is frozen (not gone) can hold a socket for longer, so
    routes need a deadline of their own.
    """
    engine = create_engine(
        url,
        pool_pre_ping=True,
        json_serializer=storable.dumps,
        hide_parameters=True,  # error messages are logged, and parameters are users' data
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
    event.listen(engine, "handle_error", _remove_values)
    return engine


def _remove_values(context: ExceptionContext) -> None:
    """Reduces an error's text to its first line: Postgres quotes rows and values in the others, which are users' data.

    `diag` of the original exception keeps all of it, for programs.
    """
    error = context.original_exception
    if not isinstance(error, psycopg.Error) or context.sqlalchemy_exception is None:
        return
    message = error.diag.message_primary
    if message is None:
        return  # an error of the connection, not of the server
    if (error.sqlstate or "").startswith(_DATA_ERRORS):
        message = message.partition(":")[0]
    error.args = (message,)
    context.sqlalchemy_exception.args = (f"({type(error).__name__}) {message}",)


def session_factory(engine: Engine) -> SessionFactory:
    """Returns a factory of sessions whose rows are read-only records."""
    factory = sessionmaker(
        engine,
        expire_on_commit=False,
        autoflush=False,
        # Queries read rows anew, so UPDATE and DELETE need not change those that the session holds.
        execution_options={"populate_existing": True, "synchronize_session": False},
    )
    event.listen(factory, "before_flush", _refuse_changed_rows)
    return factory


def _refuse_changed_rows(session: Session, _context: Any, _instances: Any) -> None:
    if session.dirty or session.deleted:
        raise RuntimeError("rows are read-only: change them by a guarded UPDATE in the store")


@contextmanager
def transaction(factory: SessionFactory) -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any error.

    Raises Unavailable when the database does not answer in time, or aborts the transaction (deadlock, lock timeout).
    """
    try:
        with factory.begin() as session:
            yield session
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        raise Unavailable("the database does not answer; try again") from error
    except exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise Unavailable("the connection to the database was lost; try again") from error


def seconds(value: float) -> BindParameter[timedelta]:
    """A Postgres interval to add to `now()`: the database's clock alone decides leases, pauses and order."""
    return literal(timedelta(seconds=value), Interval())
