"""The migrations build what store.db.tables names, once, however many processes start at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select

import migrations
from store.db.session import make_engine, session_factory, transaction
from store.db.study_tables import StudyJob
from store.db.tables import Base, Group, GroupMember, Job, Worker
from store.jobs import groups, leases
from store.jobs.groups import GroupShape
from store.jobs.spec import TrainingSpec
from store.studies import verdicts

_SPEC = TrainingSpec(model="smollm2-135m", training_file="sample:passages", seed=1).model_dump_json()
_ROWS_OF_0004 = f"""
INSERT INTO jobs (id, owner_id, state, spec, finished_at) VALUES
    ('queued', 'team', 'queued', '{_SPEC}', NULL),
    ('running', 'team', 'running', '{_SPEC}', NULL),
    ('reported', 'team', 'succeeded', '{_SPEC}', now()),
    ('unreported', 'team', 'failed', '{_SPEC}', now());
INSERT INTO studies (id, owner_id, spec) VALUES ('study_1', 'team', '{{}}'), ('study_2', 'team', '{{}}');
INSERT INTO study_jobs (job_id, study_id, place, arm, seed, told) VALUES
    ('reported', 'study_1', 0, 'heft', 1, 'succeeded'), ('queued', 'study_1', 1, 'heft', 2, NULL),
    ('unreported', 'study_2', 0, 'heft', 1, NULL);
INSERT INTO workers (id, role, info) VALUES
    ('train-1', 'train', '{{"pid": 7, "asks_for_room": "ftjob-1/2", "gave_room_to": []}}'),
    ('inference-1', 'inference', '{{"asks_for_room": null, "gave_room_to": ["ftjob-1/2"]}}'),
    ('old', 'train', '{{}}');
"""
_ROWS_OF_0007 = f"""
INSERT INTO jobs (id, owner_id, state, spec, attempt, lease_until) VALUES
    ('running', 'team', 'running', '{_SPEC}', 2, now() + interval '1 hour');
INSERT INTO groups (job_id, attempt, nodes, processes, rendezvous) VALUES ('running', 2, 3, 1, 'host:1');
INSERT INTO group_members (job_id, attempt, node_rank, worker_id, lease_until) VALUES
    ('running', 2, 1, 'train-2', now() + interval '1 hour');
"""


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


def test_a_database_of_revision_0004_migrates_with_its_rows(empty_url: str) -> None:
    migrations.upgrade(empty_url, revision="0004")
    engine = make_engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(_ROWS_OF_0004)
    migrations.upgrade(empty_url)
    sessions = session_factory(engine)
    with transaction(sessions) as session:
        states = {row.job_id: row.reported_state for row in session.scalars(select(StudyJob))}
        assert states == {"reported": "succeeded", "queued": None, "unreported": None}
        study = verdicts.next_study(session)
        assert study is not None
        assert study.id == "study_2", "the end that was reported before is not reported again"
        assert {row.id: row.info for row in session.scalars(select(Worker))} == {
            "train-1": {"pid": 7, "gpu_requested": "ftjob-1/2", "gpu_released_to": []},
            "inference-1": {"gpu_requested": None, "gpu_released_to": ["ftjob-1/2"]},
            "old": {},
        }
        claim = leases.claim(session, job_id="queued", worker_id="train-1", purpose="train")
        assert claim is not None
        assert session.get_one(Job, "running").state == "running"
    engine.dispose()


def test_a_database_of_revision_0007_migrates_with_a_group_that_nobody_joins(empty_url: str) -> None:
    migrations.upgrade(empty_url, revision="0007")
    engine = make_engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(_ROWS_OF_0007)
    migrations.upgrade(empty_url)
    with transaction(session_factory(engine)) as session:
        group, member = session.scalars(select(Group)).one(), session.scalars(select(GroupMember)).one()
        assert (group.rendezvous, group.secret) == ("host:1", None)
        assert (member.worker_id, member.ready_at) == ("train-2", None)
        shape = GroupShape(nodes=3, processes=1)
        assert groups.join(session, worker_id="train-3", shape=shape, lease_seconds=60.0) is None
    engine.dispose()
