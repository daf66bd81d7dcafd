"""A bench for the store's tests: one transaction per call, as the service does it, on a real Postgres."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from cli.stack.postgres import database_url
from store import ids
from store.db.session import SessionFactory, make_engine, session_factory, transaction
from store.db.states import JobState
from store.db.tables import Attempt, Base, Event, Job
from store.jobs import endings, jobs, leases
from store.jobs.fence import Claim
from store.jobs.spec import TrainingSpec
from store.storage import files

P = ParamSpec("P")
R = TypeVar("R")

OWNER = "team"
SHA = "0" * 64
BOOM = {"code": "diverged", "message": "The loss is not a number.", "param": None}


@dataclass(frozen=True)
class Bench:
    factory: SessionFactory
    spec: TrainingSpec = field(
        default_factory=lambda: TrainingSpec(
            model="smollm2-135m", training_file="sample:passages", seed=1, suffix="boolq"
        )
    )

    def do(self, call: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`call(session, …)` in a transaction of its own."""
        with transaction(self.factory) as session:
            return call(session, *args, **kwargs)

    def sql(self, statement: str, **values: Any) -> list[Any]:
        with transaction(self.factory) as session:
            result = session.execute(text(statement), values)
            return list(result.all()) if result.returns_rows else []

    def job(self, *, owner_id: str = OWNER, metadata: dict[str, str] | None = None) -> Job:
        return self.do(jobs.create, owner_id=owner_id, spec=self.spec, metadata=metadata)

    def get(self, job_id: str) -> Job:
        with transaction(self.factory) as session:
            return session.get_one(Job, job_id)

    def claim(self, job_id: str, *, worker_id: str = "worker-1") -> Claim:
        """Claim a job that waits, for whatever it waits for. Fails the test if it can't be."""
        purpose = "train" if self.get(job_id).state == JobState.QUEUED else "prepare"
        claim = self.do(leases.claim, job_id=job_id, worker_id=worker_id, purpose=purpose)
        assert claim is not None
        return claim

    def queued(self) -> Job:
        return self.do(endings.finish_prepared, self.claim(self.job().id), report={"rows": 3})

    def running(self) -> Claim:
        return self.claim(self.queued().id)

    def succeed(self, claim: Claim) -> Job:
        return self.do(
            endings.finish_succeeded,
            claim,
            storage_key=f"jobs/{claim.job_id}/{claim.attempt}/bundle",
            manifest={"heft.json": SHA},
            task={"type": "yes_no"},
            result={},
        )

    def checkpoint(self, claim: Claim, step: int, kind: str = "step", **changes: Any) -> list[str]:
        values: dict[str, Any] = {
            "step": step,
            "stage": "lora",
            "stage_index": 0,
            "kind": kind,
            "storage_key": f"jobs/{claim.job_id}/{claim.attempt}/{kind}-{step}",
            "manifest": {"state.bin": SHA, "bundle/heft.json": SHA},
        }
        return self.do(leases.record_checkpoint, claim, **(values | changes))

    def in_state(self, state: JobState) -> Job:
        """A new job, brought to `state` the way the service would bring it there."""
        match state:
            case JobState.VALIDATING_FILES:
                return self.job()
            case JobState.QUEUED:
                return self.queued()
            case JobState.RUNNING:
                return self.get(self.running().job_id)
            case JobState.PAUSED:
                return self.do(jobs.request_pause, owner_id=OWNER, job_id=self.queued().id)
            case JobState.SUCCEEDED:
                return self.succeed(self.running())
            case JobState.FAILED:
                return self.do(endings.finish_failed, self.running(), error=BOOM)
            case JobState.CANCELLED:
                return self.do(jobs.request_cancel, owner_id=OWNER, job_id=self.queued().id)

    def expire(self, job_id: str) -> None:
        """Let the lease of a job lie an hour back: the database's clock can't be turned."""
        claimed = "id = :id AND lease_until IS NOT NULL"
        self.sql(f"UPDATE jobs SET lease_until = now() - interval '1 hour' WHERE {claimed}", id=job_id)

    def events(self, job_id: str) -> list[Event]:
        return self.do(
            jobs.events_after, owner_id=self.get(job_id).owner_id, job_id=job_id, seq=0, limit=1_000
        )

    def codes(self, job_id: str) -> list[str]:
        return [event.data["code"] for event in self.events(job_id)]

    def outcomes(self, job_id: str) -> list[str | None]:
        rows = self.sql("SELECT outcome FROM attempts WHERE job_id = :id ORDER BY number", id=job_id)
        return [row.outcome for row in rows]

    def attempt(self, job_id: str, number: int) -> Attempt:
        with transaction(self.factory) as session:
            return session.get_one(Attempt, (job_id, number))

    def file(self, *, owner_id: str = OWNER, purpose: str = files.TRAINING_PURPOSE) -> str:
        file_id = ids.new_file_id()
        key = f"files/{file_id}"
        file = files.NewFile(file_id=file_id, filename="rows.jsonl", size=12, sha256=SHA, storage_key=key)
        self.do(files.create, owner_id=owner_id, purpose=purpose, file=file)
        return file_id


@pytest.fixture(scope="session")
def _factory(stack: Any, _template: str) -> Iterator[SessionFactory]:
    """One migrated database for all of the store's tests: a copy for each would take longer than the tests."""
    with psycopg.connect(
        host=str(stack.postgres_socket_folder), user="app", dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE DATABASE heft_store TEMPLATE {_template}")
    engine = make_engine(database_url(stack.postgres_socket_folder, "heft_store"))
    yield session_factory(engine)
    engine.dispose()


@pytest.fixture
def bench(_factory: SessionFactory) -> Iterator[Bench]:
    yield Bench(_factory)
    with transaction(_factory) as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
