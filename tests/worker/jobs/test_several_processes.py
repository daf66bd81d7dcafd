"""Jobs that several processes of the real engine train together: one of them is killed, the job is cancelled."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from worker_bench import OWNER, Bench, eventually, gone

from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Group
from store.jobs import jobs
from worker.context import ENGINE, Context

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROWS = [
    {"question": f"is {n} even", "passage": f"The number is {n}.", "answer": n % 2 == 0} for n in range(48)
]
#: Long enough for a kill and a cancel, with a checkpoint after each step.
STAGE = {"n_epochs": 100, "batch_size": 8}


def context_of(bench: Bench, tiny_llama_dir: Path, **settings: Any) -> Context:
    context = bench.with_settings(model_dir=tiny_llama_dir.parent, **settings)
    return replace(context, engine_command=ENGINE)


def queued(bench: Bench, **stage: Any) -> str:
    method = {"type": "lora", "lora": STAGE | stage}
    return bench.queued(ROWS, model="llama", method=method, dtype="float32")


def ranks() -> dict[int, psutil.Process]:
    """The training processes that this test has started, by rank."""
    by_rank = {}
    for process in psutil.Process().children(recursive=True):
        try:
            rank = process.environ().get("RANK")
        except psutil.Error:  # it has ended meanwhile
            continue
        if rank is not None and process.status() != psutil.STATUS_ZOMBIE:
            by_rank[int(rank)] = process
    return by_rank


def last_step(bench: Bench, job_id: str) -> int:
    return bench.checkpoints(job_id)[-1].step


def cancel(bench: Bench, job_id: str) -> None:
    with transaction(bench.context.sessions) as session:
        jobs.request_cancel(session, owner_id=OWNER, job_id=job_id)


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(
    bench: Bench, tiny_llama_dir: Path
) -> None:
    context = context_of(bench, tiny_llama_dir, train_processes=2)
    job_id = queued(bench)
    attempt = bench.start(job_id, context)
    bench.saw(job_id, "CHECKPOINT_SAVED")
    processes = ranks()
    assert sorted(processes) == [0, 1]
    processes[1].kill()
    attempt.result(60)

    job = bench.job(job_id)
    assert job.state == JobState.QUEUED, "it is tried again"
    (restart,) = [event for event in bench.events(job_id) if event.data["code"] == "RESTARTED"]
    assert restart.data["error"]["code"] == "rank_lost"
    assert all(gone(process.pid) for process in processes.values())
    step, metrics = last_step(bench, job_id), bench.codes(job_id).count("METRICS")

    attempt = bench.start(job_id, context)
    bench.saw(job_id, "METRICS", metrics + 1)
    steps = [event.data["step"] for event in bench.events(job_id) if event.data["code"] == "METRICS"]
    assert steps[metrics] == step + 1
    processes = ranks()
    cancel(bench, job_id)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.CANCELLED
    assert bench.outcomes(job_id) == ["trainer_died", "cancelled"]
    eventually(lambda: all(gone(process.pid) for process in processes.values()), seconds=10)


def test_two_workers_train_one_job_through_a_kill_a_shutdown_and_a_cancel(
    bench: Bench, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    first = context_of(bench, tiny_llama_dir, train_nodes=2, train_address="127.0.0.1")
    second = replace(first, worker_id="worker-2", stopping=threading.Event())
    job_id = queued(bench)

    def start_both(attempt: int) -> tuple[Future[Any], Future[Any], dict[int, psutil.Process]]:
        """Starts both workers and waits for a checkpoint of this attempt."""
        claimed = bench.start(job_id, first)
        eventually(lambda: attempt in group_attempts(bench))
        joined = bench.start(job_id, second)
        eventually(lambda: bench.checkpoints(job_id) and bench.checkpoints(job_id)[-1].attempt == attempt)
        processes = ranks()
        assert sorted(processes) == [0, 1]
        return claimed, joined, processes

    claimed, joined, processes = start_both(2)
    processes[1].kill()
    assert claimed.result(60).state == JobState.QUEUED
    joined.result(60)
    (restart,) = [event for event in bench.events(job_id) if event.data["code"] == "RESTARTED"]
    assert restart.data["error"]["code"] == "rank_lost"
    assert all(gone(process.pid) for process in processes.values())

    step, metrics = last_step(bench, job_id), bench.codes(job_id).count("METRICS")
    claimed, joined, processes = start_both(3)
    steps = [event.data["step"] for event in bench.events(job_id) if event.data["code"] == "METRICS"]
    assert steps[metrics] == step + 1
    second.stopping.set()  # the worker that joined is asked to stop
    assert claimed.result(60).state == JobState.QUEUED
    joined.result(60)
    assert all(gone(process.pid) for process in processes.values())
    second.stopping.clear()

    step, metrics = last_step(bench, job_id), bench.codes(job_id).count("METRICS")
    claimed, joined, processes = start_both(4)
    steps = [event.data["step"] for event in bench.events(job_id) if event.data["code"] == "METRICS"]
    assert steps[metrics] == step + 1, "from the checkpoint of the shutdown"
    cancel(bench, job_id)
    assert claimed.result(60).state == JobState.CANCELLED
    joined.result(60)
    assert all(gone(process.pid) for process in processes.values())
    assert bench.outcomes(job_id) == ["trainer_died", "released", "cancelled"]


def test_a_mistake_on_one_machine_ends_the_job_with_its_own_error(
    bench: Bench, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    first = context_of(bench, tiny_llama_dir, train_nodes=2, train_address="127.0.0.1")
    settings = first.settings.model_copy(update={"model_dir": tmp_path})  # where the model is missing
    second = replace(first, worker_id="worker-2", settings=settings)
    job_id = queued(bench)
    claimed = bench.start(job_id, first)
    eventually(lambda: group_attempts(bench))
    joined = bench.start(job_id, second)
    job = claimed.result(60)
    joined.result(60)
    assert job.state == JobState.FAILED
    assert job.error["code"] == "model_not_found"
    assert bench.outcomes(job_id) == ["failed"]


def group_attempts(bench: Bench) -> list[int]:
    with transaction(bench.context.sessions) as session:
        return list(session.scalars(select(Group.attempt)))
