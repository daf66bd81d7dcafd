"""Worker processes with Celery: messages, SIGTERM, SIGKILL, and logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import worker_bench
from redis import Redis
from sqlalchemy import select
from worker_bench import FAKE_ENGINE, OWNER, Bench, eventually

from store import exports
from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Export, Worker
from store.messages.broker import redis_py_url

FAKE_WORKER = Path(worker_bench.__file__).with_name("fake_worker.py")
STEPS = [{"do": "metrics", "step": 1}, {"do": "metrics", "step": 2}]
StartWorker = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start_worker(bench: Bench, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts a worker of a role and waits until it has registered; kills it after the test."""
    processes: list[subprocess.Popen[bytes]] = []
    settings = bench.context.settings.model_copy(
        update={"sweep_seconds": 0.3, "cache_dir": tmp_path / "cache"}
    )
    names = ("database_url", "redis_url", "artifacts_url", "cache_dir", "sweep_seconds", "lease_seconds")
    names += ("heartbeat_seconds", "control_seconds", "checkpoint_seconds", "death_pause_seconds")
    environment = {f"HEFT_{name.upper()}": str(getattr(settings, name)) for name in names}
    environment["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], str(FAKE_WORKER.parent)])

    def start(role: str, **more: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(FAKE_WORKER), role],
            env=os.environ | environment | more.pop("env", {}),
            **more,
        )
        processes.append(process)
        eventually(lambda: any(row.info["pid"] == process.pid for row in _workers(bench)))
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
    eventually(lambda: not _trainers(tmp_path))


def test_a_message_runs_a_job_and_sigterm_ends_the_worker(
    bench: Bench, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker("train")
    job_id = bench.queued([*STEPS, {"do": "checkpoint", "kind": "stage", "step": 3}])
    bench.context.hints.hint(job_id, "train")
    eventually(lambda: bench.job(job_id).state == JobState.SUCCEEDED)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert _workers(bench) == []
    assert not list((tmp_path / "cache" / "workers").glob("*/files"))


def test_a_job_without_a_message_starts_within_seconds(bench: Bench, start_worker: StartWorker) -> None:
    start_worker("train")
    job_id = bench.queued(STEPS)
    eventually(lambda: bench.job(job_id).state == JobState.SUCCEEDED)
    assert bench.outcomes(job_id) == ["succeeded"]


def test_sigkill_of_the_worker_ends_its_trainer_and_its_successor_resumes(
    bench: Bench, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker("train")
    job_id = bench.queued([*STEPS, {"do": "checkpoint", "step": 2}, {"do": "wait", "step": 2}])
    bench.saw(job_id, "CHECKPOINT_SAVED")
    (trainer,) = _trainers(tmp_path)
    worker.kill()
    worker.wait()
    trainer.wait(60)
    start_worker("train")
    eventually(lambda: bench.job(job_id).state == JobState.SUCCEEDED)
    assert bench.outcomes(job_id) == ["lease_lost", "succeeded"]
    assert bench.codes(job_id).count("CHECKPOINT_SAVED") == 1, "it resumed from there"


def test_sigterm_in_the_middle_of_a_job_leaves_it_queued_with_a_checkpoint(
    bench: Bench, start_worker: StartWorker
) -> None:
    worker = start_worker("train")
    job_id = bench.queued([*STEPS, {"do": "wait", "step": 2}])
    bench.saw(job_id, "METRICS")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert bench.job(job_id).state == JobState.QUEUED
    assert bench.outcomes(job_id) == ["released"]
    assert [checkpoint.step for checkpoint in bench.checkpoints(job_id)] == [2]


def _trainers(folder: Path) -> list[psutil.Process]:
    """Returns the fake engines that this test's workers have started."""
    trainers = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        of_this_test = any(word.startswith(str(folder)) for word in command)
        if FAKE_ENGINE[1] in command and of_this_test and process.status() != psutil.STATUS_ZOMBIE:
            trainers.append(process)
    return trainers


def _workers(bench: Bench) -> list[Worker]:
    with transaction(bench.context.sessions) as session:
        return list(session.scalars(select(Worker)))


def test_log_lines_of_an_attempt_have_its_job_and_number(
    bench: Bench, start_worker: StartWorker, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("wb") as log:
        worker = start_worker("train", env={"HEFT_LOG_FORMAT": "json"}, stderr=log)
    job_id = bench.queued(
        [*STEPS, {"do": "say", "text": "not an event"}, {"do": "complain", "text": "a warning"}]
    )
    bench.context.hints.hint(job_id, "train")
    eventually(lambda: bench.job(job_id).state == JobState.SUCCEEDED)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    of_attempt = [
        line["message"] for line in lines if (line.get("job_id"), line.get("attempt")) == (job_id, 2)
    ]
    assert any("not an event" in message for message in of_attempt), "read by another thread"
    assert any("a warning" in message for message in of_attempt), "from its stderr"
    assert {line["job_id"] for line in lines if line["logger"] == "worker.jobs.attempt"} == {job_id}


def test_outdated_hints_do_not_delay_other_jobs(
    bench: Bench, start_worker: StartWorker, redis_url: str
) -> None:
    """Many remain when workers have trained for hours, and Celery takes one a second."""
    ended = bench.run(bench.queued(STEPS))
    for _ in range(40):
        bench.context.hints.hint(ended.id, "train")
    with Redis.from_url(redis_py_url(redis_url)) as broker:
        eventually(lambda: broker.llen("train") == 40)
        job_id = bench.queued(STEPS)
        start_worker("train", env={"HEFT_SWEEP_SECONDS": "1000"})
        eventually(lambda: bench.job(job_id).state == JobState.SUCCEEDED)
        assert broker.llen("train") > 20


def test_outdated_export_hints_do_not_delay_other_exports(
    bench: Bench, start_worker: StartWorker, redis_url: str
) -> None:
    """Each poll for an export sends another hint."""
    models = [bench.run(bench.queued(STEPS)).fine_tuned_model for _ in range(3)]
    with transaction(bench.context.sessions) as session:
        for model_id in models:
            assert model_id is not None
            exports.request(session, owner_id=OWNER, model_id=model_id, format="bundle")
    for _ in range(20):
        bench.context.hints.export(str(models[0]), "bundle")

    def ready() -> bool:
        with transaction(bench.context.sessions) as session:
            return all(export.state == "ready" for export in session.scalars(select(Export)))

    with Redis.from_url(redis_py_url(redis_url)) as broker:
        eventually(lambda: broker.llen("export") == 20)
        start_worker("prepare", env={"HEFT_SWEEP_SECONDS": "1000"})
        eventually(ready)
        assert broker.llen("export") > 10
