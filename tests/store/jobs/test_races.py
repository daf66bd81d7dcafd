"""Many at once: real threads, real transactions. Each race has exactly one winner, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy.orm import Session

from store import idempotency, ids
from store.db.session import transaction
from store.db.states import JobState
from store.errors import InvalidRequest, LostFence, StoreError, WrongState
from store.jobs import jobs, leases, reconcile
from store.jobs.fence import Claim
from store.storage import files

OWNER = "team"


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Start all calls at the same moment; their results, or the store's errors they raised."""
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        gate.wait(10)
        try:
            return call()
        except StoreError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(30) for future in [pool.submit(run, call) for call in calls]]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_of_eight_workers_one_gets_the_job(bench) -> None:
    for _ in range(5):
        job = bench.queued()

        def claim(number: int, job_id: str = job.id) -> Claim | None:
            return bench.do(leases.claim, job_id=job_id, worker_id=f"worker-{number}", purpose="train")

        claims = together(*(partial(claim, number) for number in range(8)))
        [winner] = [claim for claim in claims if claim is not None]
        claimed = bench.get(job.id)
        assert (claimed.attempt, claimed.worker_id) == (winner.attempt, winner.worker_id)
        assert bench.outcomes(job.id) == ["prepared", None]


def test_cancel_races_success_and_one_of_them_is_the_end(bench) -> None:
    ends = set()
    for _ in range(12):
        claim = bench.running()
        cancel, success = together(
            lambda c=claim: bench.do(jobs.request_cancel, owner_id=OWNER, job_id=c.job_id),
            lambda c=claim: bench.succeed(c),
        )
        job = bench.get(claim.job_id)
        ends.add(job.state)
        assert success.state == job.state  # the worker is told how it ended
        if job.state == JobState.SUCCEEDED:
            assert isinstance(cancel, WrongState)
        else:
            assert job.state == JobState.CANCELLED
            assert cancel.cancel_requested_at is not None
        models = bench.sql("SELECT 1 FROM models WHERE job_id = :id", id=job.id)
        assert len(models) == (job.state == JobState.SUCCEEDED)
        assert bench.codes(job.id)[-1] == job.state.upper()
    assert ends <= {JobState.SUCCEEDED, JobState.CANCELLED}


def test_two_successes_of_one_attempt_leave_one_model(bench) -> None:
    claim = bench.running()
    results = together(lambda: bench.succeed(claim), lambda: bench.succeed(claim))
    assert sorted(type(result).__name__ for result in results) == ["Job", "LostFence"]
    assert len(bench.sql("SELECT 1 FROM models")) == 1
    assert bench.codes(claim.job_id).count("SUCCEEDED") == 1


def test_a_lost_worker_and_its_successor_write_and_only_one_is_heard(bench) -> None:
    lost = bench.running()
    bench.expire(lost.job_id)
    results = together(lambda: bench.succeed(lost), lambda: bench.do(reconcile.sweep))
    job = bench.get(lost.job_id)
    if isinstance(results[0], LostFence):
        assert job.state == JobState.QUEUED
        bench.succeed(bench.claim(job.id))
    assert bench.get(lost.job_id).state == JobState.SUCCEEDED
    assert len(bench.sql("SELECT 1 FROM models")) == 1


def test_events_from_many_writers_are_numbered_without_gaps(bench) -> None:
    claim = bench.running()
    seen: list[int] = []
    done = threading.Event()

    def write() -> None:
        for number in range(15):
            bench.do(leases.record_event, claim, code="METRICS", message=f"step {number}", type="metrics")

    def fail_half_way() -> None:
        for _ in range(10):
            try:
                with transaction(bench.factory) as session:
                    leases.record_event(session, claim, code="METRICS", message="never seen")
                    raise WrongState("rolled back: its number is given to the next")
            except WrongState:
                continue

    def follow() -> None:
        while True:
            last_round = done.is_set()
            page = bench.do(
                jobs.events_after, owner_id=OWNER, job_id=claim.job_id, seq=seen[-1] if seen else 0, limit=7
            )
            seen.extend(event.seq for event in page)
            if last_round and not page:
                return

    reader = threading.Thread(target=follow)
    reader.start()
    together(write, write, write, fail_half_way)
    done.set()
    reader.join(30)
    expected = list(range(1, 3 + 45 + 1))  # three before the run
    assert [event.seq for event in bench.events(claim.job_id)] == expected
    assert seen == expected  # a reader that followed meanwhile missed nothing, out of order or late
    assert bench.get(claim.job_id).event_seq == len(expected)


def test_eight_equal_requests_make_one_job(bench) -> None:
    for key in ("k1", "k2", "k3"):

        def create(key: str = key) -> str:
            with transaction(bench.factory) as session:
                reserved = idempotency.reserve(
                    session, owner_id=OWNER, key=key, body_hash="h", resource_id=ids.new_job_id()
                )
                if reserved.is_new:
                    jobs.create(session, owner_id=OWNER, spec=bench.spec, job_id=reserved.resource_id)
                return jobs.get(session, owner_id=OWNER, job_id=reserved.resource_id).id

        job_ids = together(*[create] * 8)
        assert len(set(job_ids)) == 1
    assert len(bench.sql("SELECT 1 FROM jobs")) == 3


def create_on(file_id: str) -> Callable[[Session, Any], Any]:
    def create(session: Session, bench: Any) -> Any:
        spec = bench.spec.model_copy(update={"training_file": file_id})
        return jobs.create(session, owner_id=OWNER, spec=spec)

    return create


def blocked(bench: Any) -> bool:
    return bool(bench.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))


def test_a_file_waits_with_its_deletion_for_the_job_that_is_being_made_on_it(bench) -> None:
    file_id = bench.file()
    with ThreadPoolExecutor(1) as pool:
        with transaction(bench.factory) as session:
            create_on(file_id)(session, bench)
            deletion = pool.submit(bench.do, files.delete, owner_id=OWNER, file_id=file_id)
            until(lambda: deletion.done() or blocked(bench))
            assert not deletion.done()
        deletion.result(10)
    assert bench.do(files.purgeable) == []  # the job needs the bytes


def test_a_job_waits_for_the_deletion_of_its_file_and_is_refused(bench) -> None:
    file_id = bench.file()
    with ThreadPoolExecutor(1) as pool:
        with transaction(bench.factory) as session:
            files.delete(session, owner_id=OWNER, file_id=file_id)
            creation = pool.submit(bench.do, create_on(file_id), bench)
            until(lambda: creation.done() or blocked(bench))
            assert not creation.done()
        with pytest.raises(InvalidRequest):
            creation.result(10)
    assert bench.sql("SELECT 1 FROM jobs") == []


def test_jobs_on_the_same_files_do_not_deadlock(bench) -> None:
    first_file, second_file = bench.file(), bench.file()
    specs = [
        bench.spec.model_copy(update={"training_file": first, "validation_file": second})
        for first, second in ((first_file, second_file), (second_file, first_file)) * 3
    ]
    results = together(
        *(lambda s=s: bench.do(jobs.create, owner_id=OWNER, spec=s) for s in specs),
        lambda: bench.do(files.delete, owner_id=OWNER, file_id=first_file),
    )
    assert all(not isinstance(result, StoreError) or isinstance(result, InvalidRequest) for result in results)
    assert len(bench.sql("SELECT 1 FROM jobs")) == sum(
        not isinstance(result, StoreError) for result in results[:-1]
    )
