"""A worker without Celery, on a real database, storage and broker, whose jobs a fake engine runs."""

from __future__ import annotations

import csv
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import select

from store import ids
from store.db.session import transaction
from store.db.tables import Attempt, Checkpoint, Event, Job
from store.jobs import endings, jobs, leases
from store.jobs.spec import TrainingSpec
from store.storage import files
from store.storage.artifacts import file_key
from store.storage.files import NewFile
from worker.context import Context
from worker.jobs.train import train_job

OWNER = "owner"
FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
Act = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A worker's context, with functions to create jobs and to read their rows."""

    context: Context
    pool: ThreadPoolExecutor
    owner: str = OWNER  #: the owner of the jobs

    def queued(self, acts: Sequence[Act], **spec: Any) -> str:
        """Creates a queued job whose rows are a script for the fake engine; returns its id."""
        content = "".join(json.dumps(act) + "\n" for act in acts).encode()
        job_id = self.created(content, **spec)
        with transaction(self.context.sessions) as session:
            claim = leases.claim(session, job_id=job_id, worker_id="prepare", purpose="prepare")
            assert claim is not None
            endings.finish_prepared(session, claim, report={"rows": 1})
        return job_id

    def created(self, content: bytes, **spec: Any) -> str:
        """Creates a job in `validating_files` with this training file; returns its id."""
        fields = {"model": "tiny", "training_file": self.uploaded(content), "seed": 0, **spec}
        with transaction(self.context.sessions) as session:
            job = jobs.create(session, owner_id=self.owner, spec=TrainingSpec.model_validate(fields))
        return job.id

    def uploaded(self, content: bytes) -> str:
        """Uploads a file; returns its id."""
        file_id = ids.new_file_id()
        key = file_key(file_id)
        sha256 = self.context.artifacts.put_stream(key, [content])
        with transaction(self.context.sessions) as session:
            file = NewFile(
                file_id=file_id, filename="rows.jsonl", size=len(content), sha256=sha256, storage_key=key
            )
            files.create(session, owner_id=self.owner, purpose="fine-tune", file=file)
        return file_id

    def run(self, job_id: str, context: Context | None = None) -> Job:
        """Runs one attempt and returns the job afterwards."""
        train_job(context or self.context, job_id)
        return self.job(job_id)

    def start(self, job_id: str, context: Context | None = None) -> Future[Job | None]:
        """Starts one attempt on a thread."""
        return self.pool.submit(train_job, context or self.context, job_id)

    def job(self, job_id: str) -> Job:
        with transaction(self.context.sessions) as session:
            return jobs.get(session, owner_id=self.owner, job_id=job_id)

    def events(self, job_id: str) -> list[Event]:
        with transaction(self.context.sessions) as session:
            return jobs.events_after(session, owner_id=self.owner, job_id=job_id, seq=0, limit=1000)

    def codes(self, job_id: str) -> list[str]:
        return [event.data["code"] for event in self.events(job_id)]

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with transaction(self.context.sessions) as session:
            query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.created_at)
            return list(session.scalars(query))

    def results(self, job: Job) -> list[dict[str, str]]:
        """Returns the rows of the job's result file."""
        assert job.result_file_id is not None
        with transaction(self.context.sessions) as session:
            row = files.get(session, owner_id=self.owner, file_id=job.result_file_id)
        content = b"".join(self.context.artifacts.iter_bytes(row.storage_key))
        assert len(content) == row.bytes
        return list(csv.DictReader(io.StringIO(content.decode())))

    def outcomes(self, job_id: str) -> list[str | None]:
        """Returns the outcome of each training attempt."""
        with transaction(self.context.sessions) as session:
            query = select(Attempt).where(Attempt.job_id == job_id, Attempt.purpose == "train")
            return [attempt.outcome for attempt in session.scalars(query.order_by(Attempt.number))]

    def saw(self, job_id: str, code: str, times: int = 1) -> None:
        """Waits until the job has this many events of this code."""
        eventually(lambda: self.codes(job_id).count(code) >= times)

    def with_engine(self, *command: str) -> Context:
        return replace(self.context, engine_command=command)

    def with_settings(self, **changes: Any) -> Context:
        return replace(self.context, settings=self.context.settings.model_copy(update=changes))


def gone(pid: int) -> bool:
    """Returns True for a process that has ended, or is a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def eventually(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.02)
