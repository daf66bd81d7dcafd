"""Workers that train one job together, with a fake engine: machine 0, a member, and the ends of both."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from worker_bench import OWNER, Bench, eventually, gone

from heft_engine.config.run_file import LISTEN_FD, SECRET
from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Group, GroupMember
from store.jobs import jobs
from store.messages.broker import Task
from worker.context import Context
from worker.jobs.attempt import Attempt
from worker.jobs.fetch_rows import fetch_rows
from worker.jobs.train import train_job

Acts = list[dict[str, Any]]


def workers(bench: Bench) -> tuple[Context, Context]:
    """Two workers of a group of two."""
    first = bench.with_settings(train_nodes=2, train_address="127.0.0.1")
    return first, replace(first, worker_id="worker-2", stopping=threading.Event())


def start(bench: Bench, job_id: str, context: Context) -> Future[Any]:
    return bench.pool.submit(train_job, context, job_id)


def rows(bench: Bench, table: Any) -> list[Any]:
    with transaction(bench.context.sessions) as session:
        return list(session.scalars(select(table)))


def start_both(bench: Bench, acts: Acts) -> tuple[str, Future[Any], Future[Any]]:
    """Starts a job on machine 0, then its member; returns when the group has started."""
    first, second = workers(bench)
    job_id = bench.queued(acts)
    attempt = start(bench, job_id, first)
    eventually(lambda: rows(bench, Group))
    part = start(bench, job_id, second)
    eventually(lambda: rows(bench, Group)[0].started_at is not None)
    return job_id, attempt, part


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "train.json" in " ".join(child.cmdline())]


def test_two_workers_train_one_job(bench: Bench) -> None:
    acts: Acts = [
        {"do": "told", "nodes": 2},
        {"do": "metrics", "step": 1},
        {"do": "checkpoint", "step": 1},
    ]
    job_id, attempt, part = start_both(bench, acts)
    assert attempt.result(60).state == JobState.SUCCEEDED
    assert part.result(60) is None
    assert "WAITING_FOR_WORKERS" in bench.codes(job_id)
    assert bench.codes(job_id).count("METRICS") == 1, "machine 0's alone"
    assert len(bench.checkpoints(job_id)) == 1
    assert rows(bench, GroupMember) == []
    assert rows(bench, Group)[0].rendezvous.startswith("127.0.0.1:")


def test_a_member_ends_when_the_job_is_paused(bench: Bench) -> None:
    job_id, attempt, part = start_both(bench, [{"do": "metrics", "step": 1}, {"do": "wait"}])
    bench.saw(job_id, "METRICS")
    eventually(lambda: len(children()) == 2)
    pids = [child.pid for child in children()]
    with transaction(bench.context.sessions) as session:
        jobs.request_pause(session, owner_id=OWNER, job_id=job_id)
    assert attempt.result(60).state == JobState.PAUSED
    assert part.result(60) is None
    assert all(map(gone, pids))


def test_both_machines_get_the_secret_of_the_group_and_one_its_socket(bench: Bench) -> None:
    first, second = workers(bench)
    job_id = bench.queued([{"do": "metrics", "step": 1}, {"do": "wait"}])
    attempt = start(bench, job_id, first)
    eventually(lambda: rows(bench, Group))
    (group,) = rows(bench, Group)
    host, _, port = group.rendezvous.partition(":")
    with socket.create_connection((host, int(port)), timeout=10):
        pass  # it listens from the start, so no other process takes the port
    part = start(bench, job_id, second)
    bench.saw(job_id, "METRICS")
    eventually(lambda: len(children()) == 2)
    by_rank = {
        json.loads(Path(child.cmdline()[-2]).read_text())["node_rank"]: child.environ()
        for child in children()
    }
    assert len(group.secret) == 64
    assert [by_rank[rank][SECRET] for rank in (0, 1)] == [group.secret] * 2
    assert LISTEN_FD in by_rank[0]
    assert LISTEN_FD not in by_rank[1]
    assert all(group.secret not in "".join(child.cmdline()) for child in children())
    with transaction(bench.context.sessions) as session:
        jobs.request_cancel(session, owner_id=OWNER, job_id=job_id)
    assert attempt.result(60).state == JobState.CANCELLED
    part.result(60)


def test_a_group_starts_when_its_members_have_their_rows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = workers(bench)
    job_id = bench.queued([{"do": "metrics", "step": 1}])
    attempt = start(bench, job_id, first)
    eventually(lambda: rows(bench, Group))
    fetched = threading.Event()

    def fetch_later(attempt: Attempt) -> Any:
        assert fetched.wait(60)
        return fetch_rows(attempt)

    monkeypatch.setattr("worker.jobs.group.fetch_rows", fetch_later)
    part = start(bench, job_id, second)
    eventually(lambda: rows(bench, GroupMember))
    assert rows(bench, Group)[0].started_at is None
    fetched.set()
    assert attempt.result(60).state == JobState.SUCCEEDED
    part.result(60)
    (group,) = rows(bench, Group)
    assert group.started_at is not None


def test_a_member_whose_processes_die_ends_the_attempt(bench: Bench) -> None:
    job_id, attempt, part = start_both(bench, [{"do": "metrics", "step": 1}, {"do": "silent"}])
    bench.saw(job_id, "METRICS")
    eventually(lambda: len(children()) == 2)
    (member,) = [child for child in children() if f"{job_id}-1-" in " ".join(child.cmdline())]
    member.kill()
    assert attempt.result(60).state == JobState.QUEUED
    part.result(60)
    (restart,) = [event for event in bench.events(job_id) if event.data["code"] == "RESTARTED"]
    assert restart.data["error"]["code"] == "rank_lost"
    assert bench.outcomes(job_id) == ["trainer_died"]


def test_a_member_that_shuts_down_during_an_evaluation_gives_the_job_back(bench: Bench) -> None:
    """Its processes wait for machine 0, so they neither write a checkpoint nor end in time."""
    first, second = workers(bench)
    second = replace(second, settings=second.settings.model_copy(update={"checkpoint_grace_seconds": 0.1}))
    job_id = bench.queued([{"do": "checkpoint", "step": 1}, {"do": "stubborn"}])
    attempt = start(bench, job_id, first)
    eventually(lambda: rows(bench, Group))
    part = start(bench, job_id, second)
    bench.saw(job_id, "METRICS")
    eventually(lambda: len(children()) == 2)
    second.stopping.set()
    part.result(60)
    job = attempt.result(60)
    assert (job.state, job.trainer_deaths) == (JobState.QUEUED, 0)
    assert bench.outcomes(job_id) == ["released"]


@pytest.mark.parametrize("by", ["report", "crash"])
def test_the_error_of_a_member_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Machine 0 notices first that a process is lost, or is ended itself; then the member says what has happened."""
    ended = threading.Event()
    run_child = Attempt.run_child

    def run_in_order(attempt: Attempt, command: str, run: Any, handle: Any, node: Any) -> int:
        is_first = node.rank == 0
        if not is_first:
            assert ended.wait(60)
        exit_code = run_child(attempt, command, run, handle, node)
        if is_first:
            ended.set()
        return exit_code

    monkeypatch.setattr(Attempt, "run_child", run_in_order)
    last: dict[str, Any] = {"do": "fail", "code": "rank_lost", "message": "lost"}
    if by == "crash":
        last = {"do": "die", "code": -9}
    member: dict[str, Any] = {"do": "fail", "code": "model_not_found", "message": "no model", "node_rank": 1}
    _, attempt, part = start_both(bench, [member, last])
    job = attempt.result(60)
    part.result(60)
    assert job.state == JobState.FAILED
    assert job.error["code"] == "model_not_found"


def test_a_member_that_shuts_down_before_the_start_leaves_its_place(
    bench: Bench, sent: list[tuple[str, ...]]
) -> None:
    first, second = workers(bench)
    three = {"train_nodes": 3}
    first, second = (
        replace(context, settings=context.settings.model_copy(update=three)) for context in (first, second)
    )
    job_id = bench.queued([])
    attempt = start(bench, job_id, first)
    eventually(lambda: rows(bench, Group))
    eventually(lambda: len(sent) == 2)
    assert sent == [(Task.TRAIN, job_id)] * 2, "a hint for each member"
    part = start(bench, job_id, second)
    eventually(lambda: rows(bench, GroupMember))
    second.stopping.set()
    part.result(60)
    assert rows(bench, GroupMember) == []
    with transaction(bench.context.sessions) as session:
        jobs.request_cancel(session, owner_id=OWNER, job_id=job_id)
    assert attempt.result(60).state == JobState.CANCELLED


def test_a_stop_that_another_worker_asked_for_gives_the_job_back(bench: Bench) -> None:
    """The ranks of machine 0 end with a checkpoint, without a request of its own."""
    job = bench.run(bench.queued([{"do": "checkpoint", "step": 1}, {"do": "die", "code": 75}]))
    assert job.state == JobState.QUEUED
    assert job.trainer_deaths == 0
    assert bench.outcomes(job.id) == ["released"]


def test_two_workers_with_two_jobs_do_not_wait_for_each_other(bench: Bench) -> None:
    first, second = workers(bench)
    older, younger = bench.queued([{"do": "metrics", "step": 1}]), bench.queued([])
    attempt = start(bench, older, first)
    eventually(lambda: rows(bench, Group))
    with transaction(bench.context.sessions) as session:
        # As if both had looked for a group before there was one.
        session.execute(Group.__table__.update().values(nodes=9))
    other = start(bench, younger, second)
    eventually(lambda: len(rows(bench, Group)) == 2)
    with transaction(bench.context.sessions) as session:
        session.execute(Group.__table__.update().values(nodes=2))
    released = other.result(60)
    assert released.state == JobState.QUEUED
    assert bench.outcomes(younger) == ["released"]
    assert start(bench, younger, second).result(60) is None, "it joins the other group"
    assert attempt.result(60).state == JobState.SUCCEEDED
