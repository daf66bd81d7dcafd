"""The reconciler: lost messages are sent again, lost leases taken back, outages waited out."""

from __future__ import annotations

import threading

import pytest

from store.db.session import transaction
from store.db.states import JobState
from store.errors import LostFence
from store.jobs import endings, jobs, leases, reconcile

OWNER = "team"


def test_a_hint_that_was_lost_is_sent_again_once_it_is_stale(bench) -> None:
    unchecked, queued = bench.job(), bench.queued()
    bench.running()  # held: no hint
    assert bench.do(reconcile.sweep) == []  # both were hinted just now, by those who made them
    bench.sql("UPDATE jobs SET hinted_at = now() - interval '16 seconds'")
    assert bench.do(reconcile.sweep) == [(unchecked.id, "prepare"), (queued.id, "train")]
    assert bench.do(reconcile.sweep) == []


def test_a_long_queue_is_hinted_from_its_oldest_end(bench) -> None:
    job_ids = [bench.queued().id for _ in range(4)]
    assert bench.do(reconcile.sweep, stale_seconds=0, limit=2) == [(id, "train") for id in job_ids[:2]]
    assert bench.do(reconcile.sweep, stale_seconds=0, limit=2) == [(id, "train") for id in job_ids[:2]]
    bench.claim(job_ids[0])
    assert bench.do(reconcile.sweep, stale_seconds=0, limit=2) == [(id, "train") for id in job_ids[1:3]]


def test_a_job_in_its_pause_after_a_death_is_not_hinted(bench) -> None:
    error = {"code": "trainer_died", "message": "It died.", "param": None}
    job = bench.do(endings.record_crash, bench.running(), error=error)
    assert bench.do(reconcile.sweep) == []
    bench.sql("UPDATE jobs SET not_before = now()")
    assert bench.do(reconcile.sweep) == [(job.id, "train")]


def test_a_lease_that_lives_is_left_alone(bench) -> None:
    claim = bench.running()
    bench.sql("UPDATE jobs SET lease_until = now() - interval '4 seconds'")  # within the grace
    assert bench.do(reconcile.sweep) == []
    bench.do(leases.heartbeat, claim)


@pytest.mark.parametrize(
    ("purpose", "state"), [("prepare", JobState.VALIDATING_FILES), ("train", JobState.QUEUED)]
)
def test_an_expired_lease_is_taken_back_and_hinted(bench, purpose: str, state: JobState) -> None:
    claim = bench.claim(bench.job().id) if purpose == "prepare" else bench.running()
    bench.expire(claim.job_id)
    assert bench.do(reconcile.sweep) == [(claim.job_id, purpose)]
    job = bench.get(claim.job_id)
    assert (job.state, job.lost_leases, job.worker_id, job.lease_until) == (state, 1, None, None)
    assert bench.codes(job.id)[-1] == "RESTARTED"
    assert bench.outcomes(job.id)[-1] == "lease_lost"
    with pytest.raises(LostFence):
        bench.do(leases.heartbeat, claim)
    assert bench.claim(job.id).attempt == claim.attempt + 1


def test_a_cancel_is_carried_out_although_the_worker_is_lost(bench) -> None:
    claim = bench.running()
    bench.do(jobs.request_cancel, owner_id=OWNER, job_id=claim.job_id)
    bench.expire(claim.job_id)
    assert bench.do(reconcile.sweep) == []
    assert bench.get(claim.job_id).state == JobState.CANCELLED
    assert bench.codes(claim.job_id)[-1] == "CANCELLED"


def test_a_pause_is_carried_out_although_the_worker_is_lost(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10)
    bench.do(jobs.request_pause, owner_id=OWNER, job_id=claim.job_id)
    bench.expire(claim.job_id)
    assert bench.do(reconcile.sweep) == []
    assert bench.get(claim.job_id).state == JobState.PAUSED
    assert bench.do(jobs.resume, owner_id=OWNER, job_id=claim.job_id).state == JobState.QUEUED
    resumed = bench.claim(claim.job_id)
    assert [checkpoint.step for checkpoint in resumed.checkpoints] == [10]


def test_a_job_that_loses_every_worker_fails_in_the_end(bench) -> None:
    job_id = bench.queued().id
    for lost in range(1, 4):
        bench.claim(job_id)
        bench.expire(job_id)
        bench.do(reconcile.sweep, max_lost_leases=2)
        job = bench.get(job_id)
        assert job.lost_leases == lost
        assert job.trainer_deaths == 0
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "worker_lost"


def test_after_an_outage_nothing_is_taken_over_for_one_lease(bench) -> None:
    bench.do(reconcile.sweep)
    claim = bench.running()
    bench.expire(claim.job_id)
    bench.sql("UPDATE reconciler SET swept_at = now() - interval '61 seconds'")  # nobody swept for a lease
    bench.do(reconcile.sweep)
    bench.do(reconcile.sweep)  # nor does the next sweep take it: its worker may come back
    bench.do(leases.heartbeat, claim)
    bench.expire(claim.job_id)
    bench.sql("UPDATE reconciler SET takeover_after = now()")
    assert bench.do(reconcile.sweep) == [(claim.job_id, "train")]


def test_a_worker_takes_back_what_its_earlier_life_held(bench) -> None:
    mine, other = bench.running(), bench.claim(bench.queued().id, worker_id="worker-2")
    bench.do(reconcile.take_back_from, worker_id="worker-1")
    assert bench.get(mine.job_id).state == JobState.QUEUED
    assert bench.get(other.job_id).state == JobState.RUNNING
    assert bench.do(reconcile.sweep) == [(mine.job_id, "train")]


def test_one_sweep_at_a_time(bench) -> None:
    job = bench.queued()
    inside, leave = threading.Event(), threading.Event()

    def sweep_slowly() -> None:
        with transaction(bench.factory) as session:
            reconcile.sweep(session)
            inside.set()
            assert leave.wait(10)

    thread = threading.Thread(target=sweep_slowly)
    thread.start()
    assert inside.wait(10)
    assert bench.do(reconcile.sweep, stale_seconds=0) == []
    leave.set()
    thread.join()
    assert bench.do(reconcile.sweep, stale_seconds=0) == [(job.id, "train")]


def test_a_row_that_is_being_written_is_not_taken_back(bench) -> None:
    claim = bench.running()
    bench.expire(claim.job_id)
    with transaction(bench.factory) as session:
        leases.heartbeat(session, claim)  # not yet committed
        assert bench.do(reconcile.sweep) == []
    assert bench.get(claim.job_id).state == JobState.RUNNING
