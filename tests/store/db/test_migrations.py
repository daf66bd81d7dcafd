"""The migrations build what store.db.tables names, once, however many processes start at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect

import migrations
from store.db.session import make_engine
from store.db.tables import Base


@pytest.fixture
def empty_url(database_url: str, stack) -> str:
    """A database in which nothing has ever been migrated."""
    engine = make_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    engine.dispose()
    return database_url


def test_the_migrations_build_what_the_code_expects(database_url: str) -> None:
    engine = make_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        checks = {check["name"] for check in inspect(connection).get_check_constraints("jobs")}
    assert checks == {"jobs_state"}
    engine.dispose()


def test_simultaneous_starters_migrate_once(empty_url: str) -> None:
    engine = make_engine(empty_url)
    assert not migrations.is_current(engine)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrations.upgrade, [empty_url] * 4))
    assert migrations.is_current(engine)
    engine.dispose()


def test_an_older_database_is_not_current(database_url: str) -> None:
    engine = make_engine(database_url)
    assert migrations.is_current(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    assert not migrations.is_current(engine)
    engine.dispose()


def test_the_folder_of_the_caller_does_not_matter(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    migrations.upgrade(empty_url)
    engine = make_engine(empty_url)
    assert migrations.is_current(engine)
    engine.dispose()
