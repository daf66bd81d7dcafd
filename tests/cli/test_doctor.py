"""`heft doctor` on servers of one's own: what is away, old, stuck or missing is named, with what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from cli.main import app
from cli.stack.home import Home
from cli.stack.postgres import database_url as address
from store.db.session import SessionFactory, make_engine, session_factory, transaction
from store.jobs import jobs, leases, reconcile
from store.jobs.spec import TrainingSpec
from store.ops import workers

Doctor = Callable[..., dict[str, Any]]


@pytest.fixture
def sessions(database_url: str) -> Iterator[SessionFactory]:
    engine = make_engine(database_url, pool_size=1)
    yield session_factory(engine)
    engine.dispose()


@pytest.fixture
def doctor(home: Home, database_url: str, redis_url: str, artifacts_url: str) -> Doctor:
    """Runs `heft doctor --json`; `ok` corresponds to its exit code."""

    def run(**changes: str) -> dict[str, Any]:
        places = {
            "HEFT_DATABASE_URL": database_url,
            "HEFT_REDIS_URL": redis_url,
            "HEFT_ARTIFACTS_URL": artifacts_url,
        }
        result = CliRunner().invoke(
            app, ["--home", str(home.path), "doctor", "--json"], env={**places, **changes}
        )
        told: dict[str, Any] = json.loads(result.stdout)
        assert result.exit_code == (0 if told["ok"] else 1)
        return told

    return run


def state(told: dict[str, Any], name: str) -> str:
    return str(next(check["state"] for check in told["checks"] if check["name"] == name))


def is_well(sessions: SessionFactory) -> None:
    """Workers of every role have just been seen, and one has swept."""
    with transaction(sessions) as session:
        for role in ("train", "prepare", "inference"):
            workers.register(session, worker_id=f"{role}-0", role=role, info={"host": "here", "pid": 1})
        reconcile.sweep(session)


def test_all_is_well(doctor: Doctor, sessions: SessionFactory, artifacts_url: str) -> None:
    is_well(sessions)
    told = doctor()
    assert told["ok"]
    assert {check["state"] for check in told["checks"]} == {"ok"}
    assert not any(check["advice"] for check in told["checks"])
    assert list(Path(artifacts_url.removeprefix("file://")).iterdir()) in (
        [],
        [Path(artifacts_url[7:]) / ".incomplete"],
    )


def test_nobody_works(doctor: Doctor) -> None:
    told = doctor()
    wrong = {check["name"]: check for check in told["checks"] if check["state"] == "wrong"}
    assert set(wrong) == {"train workers", "prepare workers", "inference workers", "reconciler"}
    assert "heft worker train" in wrong["train workers"]["advice"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"HEFT_DATABASE_URL": "postgresql+psycopg://app:secret@/postgres?host=/nowhere"}, "database"),
        ({"HEFT_REDIS_URL": "redis+socket:///nowhere/socket?virtual_host=0"}, "broker"),
        ({"HEFT_ARTIFACTS_URL": "file:///proc/nowhere"}, "storage"),
        ({"HEFT_URL": "http://127.0.0.1:9"}, "API"),
    ],
)
def test_what_is_away_is_named(
    doctor: Doctor, sessions: SessionFactory, change: dict[str, str], name: str
) -> None:
    is_well(sessions)
    told = doctor(**change)
    assert [check["name"] for check in told["checks"] if check["state"] == "wrong"] == [name]
    assert all(check["advice"] for check in told["checks"] if check["state"] == "wrong")
    assert "secret" not in json.dumps(told)


def test_tables_of_another_version(doctor: Doctor, stack: Any) -> None:
    """An empty database."""
    told = doctor(HEFT_DATABASE_URL=address(stack.postgres_socket_folder))
    assert state(told, "database") == "ok"
    assert "heft migrate" in next(
        check["advice"] for check in told["checks"] if check["name"] == "migrations"
    )


def test_stuck_jobs_and_silent_workers(doctor: Doctor, sessions: SessionFactory) -> None:
    is_well(sessions)
    held, waiting = (created(sessions) for _ in range(2))
    with transaction(sessions) as session:
        leases.claim(session, job_id=held, worker_id="prepare-9", purpose="prepare")
        session.execute(
            text("UPDATE jobs SET lease_until = now() - interval '1 hour' WHERE id = :id"), {"id": held}
        )
        session.execute(
            text("UPDATE jobs SET trainer_deaths = 2, lost_leases = 4 WHERE id = :id"), {"id": waiting}
        )
        session.execute(text("UPDATE events SET created_at = now() - interval '1 hour'"))
        session.execute(text("UPDATE workers SET seen_at = now() - interval '1 day' WHERE role = 'train'"))
    told = doctor()
    stuck = [check["found"] for check in told["checks"] if check["name"] == "stuck job"]
    assert any(held in found and "expired 3600 s ago" in found for found in stuck)
    assert any(waiting in found and "crashed 2 times" in found for found in stuck)
    assert any(waiting in found and "lost 4 times" in found for found in stuck)
    assert state(told, "silent worker") == "warning"
    assert state(told, "train workers") == "wrong"
    # One is held by a worker that is gone, so the one that lives could take the other, but does not.
    assert state(told, "training queue") == "ok"


def test_an_idle_worker_that_hears_of_nothing(doctor: Doctor, sessions: SessionFactory) -> None:
    is_well(sessions)
    created(sessions)
    assert doctor()["ok"]
    with transaction(sessions) as session:
        session.execute(text("UPDATE events SET created_at = now() - interval '10 minutes'"))
    told = doctor()
    assert state(told, "validation queue") == "wrong"


def test_people_are_told_what_to_do(
    home: Home, database_url: str, redis_url: str, artifacts_url: str
) -> None:
    places = {
        "HEFT_DATABASE_URL": database_url,
        "HEFT_REDIS_URL": redis_url,
        "HEFT_ARTIFACTS_URL": artifacts_url,
    }
    result = CliRunner().invoke(app, ["--home", str(home.path), "doctor"], env=places)
    assert result.exit_code == 1
    assert "inference workers: start one: `heft worker inference`" in result.stdout


def created(sessions: SessionFactory) -> str:
    spec = TrainingSpec(model="tiny", training_file="sample:passages", seed=1)
    with transaction(sessions) as session:
        return jobs.create(session, owner_id="team", spec=spec).id
