"""A worker's bench for each test: a real database, storage and broker, and intervals of tenths of a second."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine
from worker_bench import FAKE_ENGINE, Bench

from store.db.session import make_engine, session_factory
from store.messages.broker import make_celery
from store.messages.hints import Hints
from store.settings import StoreSettings
from store.storage.artifacts import Artifacts
from worker.context import Context


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def bench(
    engine: Engine, database_url: str, redis_url: str, artifacts_url: str, tmp_path: Path
) -> Iterator[Bench]:
    """A worker that reads stop requests every 50 ms, with leases of 30 s."""
    settings = StoreSettings(
        database_url=database_url,
        redis_url=redis_url,
        artifacts_url=artifacts_url,
        lease_seconds=30,
        heartbeat_seconds=0.1,
        control_seconds=0.05,
        death_pause_seconds=0,
        checkpoint_seconds=0,
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    hints = Hints(make_celery(redis_url))
    stopping = threading.Event()
    context = Context(
        worker_id="worker-1",
        settings=settings,
        sessions=session_factory(engine),
        artifacts=Artifacts(artifacts_url),
        hints=hints,
        scratch=scratch,
        shared=tmp_path / "shared",
        stopping=stopping,
        engine_command=FAKE_ENGINE,
    )
    with ThreadPoolExecutor() as pool:
        yield Bench(context=context, pool=pool)
        stopping.set()
    hints.close()
    assert list(scratch.iterdir()) == []


@pytest.fixture
def sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The hints that were sent, in place of a broker."""
    hints: list[tuple[str, ...]] = []
    monkeypatch.setattr(bench.context.hints, "send", lambda task, *args: hints.append((task, *args)))
    return hints
