"""`heft doctor` on real servers: it names parts that are down, outdated, stuck or missing, with advice."""

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
        report: dict[str, Any] = json.loads(result.stdout)
        assert result.exit_code == (0 if report["ok"] else 1)
        return report

    return run


def state(report: dict[str, Any], name: str) -> str:
    return str(next(check["state"] for check in report["checks"] if check["name"] == name))


def is_well(sessions: SessionFactory) -> None:
    """Recent heartbeats of workers of every role, and a recent sweep."""
    with transaction(sessions) as session:
        for role in ("train", "prepare", "inference"):
            workers.register(session, worker_id=f"{role}-0", role=role, info={"host": "here", "pid": 1})
        reconcile.sweep(session)


def test_a_working_service_is_ok(doctor: Doctor, sessions: SessionFactory, artifacts_url: str) -> None:
    is_well(sessions)
    report = doctor()
    assert report["ok"]
    assert {check["state"] for check in report["checks"]} == {"ok"}
    assert not any(check["advice"] for check in report["checks"])
    assert list(Path(artifacts_url.removeprefix("file://")).iterdir()) in (
        [],
        [Path(artifacts_url[7:]) / ".incomplete"],
    )


def test_a_service_without_workers(doctor: Doctor) -> None:
    report = doctor()
    wrong = {check["name"]: check for check in report["checks"] if check["state"] == "wrong"}
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
def test_servers_that_do_not_answer_are_named(
    doctor: Doctor, sessions: SessionFactory, change: dict[str, str], name: str
) -> None:
    is_well(sessions)
    report = doctor(**change)
    assert [check["name"] for check in report["checks"] if check["state"] == "wrong"] == [name]
    assert all(check["advice"] for check in report["checks"] if check["state"] == "wrong")
    assert "secret" not in json.dumps(report)


def test_a_schema_of_another_version(doctor: Doctor, stack: Any) -> None:
    """An empty database."""
    report = doctor(HEFT_DATABASE_URL=address(stack.postgres_socket_folder))
    assert state(report, "database") == "ok"
    assert "heft migrate" in next(
        check["advice"] for check in report["checks"] if check["name"] == "migrations"
    )


def test_stuck_jobs_and_silent_workers(doctor: Doctor, sessions: SessionFactory) -> None:
    is_well(sessions)
    claimed, waiting = (created(sessions) for _ in range(2))
    with transaction(sessions) as session:
        leases.claim(session, job_id=claimed, worker_id="prepare-9", purpose="prepare")
        session.execute(
            text("UPDATE jobs SET lease_until = now() - interval '1 hour' WHERE id = :id"), {"id": claimed}
        )
        session.execute(
            text("UPDATE jobs SET trainer_deaths = 2, lost_leases = 4 WHERE id = :id"), {"id": waiting}
        )
        session.execute(text("UPDATE events SET created_at = now() - interval '1 hour'"))
        session.execute(text("UPDATE workers SET seen_at = now() - interval '1 day' WHERE role = 'train'"))
    report = doctor()
    stuck = [check["found"] for check in report["checks"] if check["name"] == "stuck job"]
    assert any(claimed in result and "expired 3600 s ago" in result for result in stuck)
    assert any(waiting in result and "crashed 2 times" in result for result in stuck)
    assert any(waiting in result and "lost 4 times" in result for result in stuck)
    assert state(report, "silent worker") == "warning"
    assert state(report, "train workers") == "wrong"
    # A lost worker holds one job; the live worker could take the other, but does not.
    assert state(report, "training queue") == "ok"


def test_a_job_waiting_beside_an_idle_worker_is_reported(doctor: Doctor, sessions: SessionFactory) -> None:
    is_well(sessions)
    created(sessions)
    assert doctor()["ok"]
    with transaction(sessions) as session:
        session.execute(text("UPDATE events SET created_at = now() - interval '10 minutes'"))
    report = doctor()
    assert state(report, "validation queue") == "wrong"


def test_the_text_output_has_advice(
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
