"""Transactions: all or nothing; a database that is away is called so quickly, and nothing else is."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import pytest
from sqlalchemy import exc, text
from sqlalchemy.orm import Session

from store.db.session import make_engine, session_factory, transaction
from store.errors import Unavailable
from store.jobs import jobs

_VALUE = "-".join(("a", "patient", "s", "history"))  # not as a traceback's source lines have it


def test_an_error_leaves_nothing_behind(bench) -> None:
    def create_and_fail(session: Session) -> None:
        jobs.create(session, owner_id="team", spec=bench.spec)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.do(create_and_fail)
    assert bench.sql("SELECT * FROM jobs") == []
    assert bench.sql("SELECT * FROM events") == []


def test_a_database_that_is_away_is_unavailable(tmp_path: Path) -> None:
    engine = make_engine(f"postgresql+psycopg://app@/heft?host={tmp_path}")
    begun = time.monotonic()
    with pytest.raises(Unavailable), transaction(session_factory(engine)) as session:
        session.execute(text("SELECT 1"))
    assert time.monotonic() - begun < 5
    engine.dispose()


def test_a_statement_that_takes_too_long_is_unavailable(bench) -> None:
    def sleep(session: Session) -> None:
        session.execute(text("SET LOCAL statement_timeout = 50"))
        session.execute(text("SELECT pg_sleep(5)"))

    with pytest.raises(Unavailable):
        bench.do(sleep)


def test_a_connection_that_the_server_ended_is_unavailable_once(bench) -> None:
    with pytest.raises(Unavailable), transaction(bench.factory) as session:
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert bench.sql("SELECT 1 AS one")[0].one == 1


def test_a_pool_that_is_empty_is_unavailable(database_url: str) -> None:
    engine = make_engine(database_url, pool_size=1)
    factory = session_factory(engine)
    connections = [engine.connect() for _ in range(2)]
    with pytest.raises(Unavailable), transaction(factory) as session:
        session.execute(text("SELECT 1"))
    for connection in connections:
        connection.close()
    engine.dispose()


def test_a_mistake_of_ours_is_not_called_an_outage(bench) -> None:
    with pytest.raises(exc.ProgrammingError):
        bench.sql("SELECT * FROM no_such_table")
    with pytest.raises(exc.DataError):
        bench.sql("SELECT CAST(:number AS integer)", number="not a number")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE jobs SET state = 'lost', metadata = jsonb_build_object('k', CAST(:value AS text))",
        "UPDATE jobs SET owner_id = NULL, metadata = jsonb_build_object('k', CAST(:value AS text))",
        "INSERT INTO idempotency_keys (owner_id, key, body_hash, resource_id)"
        " SELECT CAST(:value AS text), 'k', 'h', 'r' FROM generate_series(1, 2)",
        "SELECT CAST(:value AS integer)",
        "SELECT CAST(:value AS jsonb)",
    ],
)
def test_what_stands_in_a_row_does_not_stand_in_an_error(bench, statement: str) -> None:
    """An error's text, and that of the error behind it, go into logs."""
    bench.job()
    with pytest.raises(exc.DBAPIError) as caught:
        bench.sql(statement, value=_VALUE)
    report = "".join(traceback.format_exception(caught.value))
    assert _VALUE not in report
    assert type(caught.value.orig).__name__ in report


def test_rows_stay_readable_after_their_transaction(bench) -> None:
    with transaction(bench.factory) as session:
        job = jobs.create(session, owner_id="team", spec=bench.spec)
    assert job.spec["model"] == "smollm2-135m"
    assert job.event_seq == 1
