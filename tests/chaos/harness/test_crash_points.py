"""Crash points have the name of the function that commits, whatever its transaction goes through."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from faults import kills
from harness import crash_points
from sqlalchemy import text
from sqlalchemy.orm import Session

from api.database import Database
from store.db.session import SessionFactory, make_engine, session_factory
from worker.chores import reconcile
from worker.jobs import attempt


@pytest.fixture
def sessions(database_url: str) -> Iterator[SessionFactory]:
    engine = make_engine(database_url)
    yield session_factory(engine)
    engine.dispose()


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the commits of this process."""
    names: list[str] = []
    commit = psycopg.Connection.commit

    def crossing(connection: psycopg.Connection) -> None:
        names.append(f"commit {crash_points._caller()}")
        commit(connection)

    monkeypatch.setattr(psycopg.Connection, "commit", crossing)
    return names


def finish_something(session: Session, claim: Any = None) -> None:
    session.execute(text("SELECT 1"))


def test_a_store_function_has_its_own_name_in_worker_and_api(
    sessions: SessionFactory, points: list[str], tmp_path: Path
) -> None:
    context: Any = SimpleNamespace(sessions=sessions, stopping=threading.Event())
    claim: Any = None
    supervisor: Any = SimpleNamespace(stop_reason=None)
    attempt.Attempt(context, claim, tmp_path, supervisor).write(finish_something)
    asyncio.run(Database(sessions)(finish_something))
    assert points == ["commit finish_something"] * 2


def test_other_commits_have_the_name_of_their_caller(sessions: SessionFactory, points: list[str]) -> None:
    settings = SimpleNamespace(lease_seconds=60, lease_grace_seconds=5, sweep_seconds=15, max_lost_leases=20)
    context: Any = SimpleNamespace(sessions=sessions, worker_id="w", settings=settings)
    assert attempt._claim(context, "ftjob-none", "train") is None
    reconcile.recover_lost(context)
    assert points == [kills.CLAIM, kills.RECONCILE]
    assert set(points) <= {*kills.WORKER_POINTS, kills.RECONCILE}
