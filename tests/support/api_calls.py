"""Calls that several tests of the API make, and the steps of a worker on a job."""

from __future__ import annotations

from typing import Any

import httpx
from kombu import Connection

from store.db.session import SessionFactory, transaction
from store.jobs import endings, leases
from store.jobs.fence import Claim
from store.settings import StoreSettings

JOBS = "/v1/fine_tuning/jobs"
MINIMAL: dict[str, Any] = {"model": "smollm2-135m", "training_file": "sample:passages"}


def create(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post(JOBS, json=MINIMAL | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["param"]


def claim(sessions: SessionFactory, job_id: str, purpose: str) -> Claim:
    with transaction(sessions) as session:
        claimed = leases.claim(session, job_id=job_id, worker_id="worker-1", purpose=purpose)  # type: ignore[arg-type]
    assert claimed is not None
    return claimed


def running(client: httpx.Client, sessions: SessionFactory, **changes: Any) -> Claim:
    """A job that a worker trains on."""
    job_id = create(client, **changes)["id"]
    with transaction(sessions) as session:
        endings.finish_prepared(session, claim(sessions, job_id, "prepare"), report={"rows": 3})
    return claim(sessions, job_id, "train")


def hint(settings: StoreSettings, queue_name: str, job_id: str) -> str:
    """Returns the task name of the next message about this job. Messages about other jobs are dropped."""
    with Connection(settings.redis_url) as broker, broker.SimpleQueue(queue_name, no_ack=True) as queue:
        while True:
            message = queue.get(timeout=10)
            if message.payload[0] == [job_id]:
                return str(message.headers["task"])
