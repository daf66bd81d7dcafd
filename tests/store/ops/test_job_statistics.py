"""The service in numbers."""

from __future__ import annotations

from store.db.states import JobState
from store.jobs import jobs, leases
from store.ops import job_statistics


def test_jobs_are_counted_by_state_and_the_oldest_that_waits_is_told(bench) -> None:
    bench.job()
    old = bench.queued()
    bench.queued()
    bench.succeed(bench.running())
    bench.do(jobs.request_cancel, owner_id="team", job_id=bench.job().id)
    bench.sql("UPDATE jobs SET created_at = now() - interval '90 seconds' WHERE id = :id", id=old.id)
    statistics = bench.do(job_statistics.jobs)
    assert statistics.by_state == dict.fromkeys(JobState, 0) | {
        "validating_files": 1,
        "queued": 2,
        "succeeded": 1,
        "cancelled": 1,
    }
    assert 90 <= statistics.waiting_seconds["queued"] < 120
    assert 0 <= statistics.waiting_seconds["validating_files"] < 60
    assert (statistics.step_seconds, statistics.tokens_per_second) == ({}, {})


def test_dry_runs_are_not_counted(bench) -> None:
    bench.do(jobs.create, owner_id="team", spec=bench.spec.model_copy(update={"dry_run": True}))
    bench.job()
    assert bench.do(job_statistics.jobs).by_state["validating_files"] == 1


def test_running_jobs_are_as_fast_as_they_say(bench) -> None:
    empty = bench.do(job_statistics.jobs)
    assert empty.waiting_seconds == {"validating_files": 0.0, "queued": 0.0}
    for eta, tokens in ((20.0, 500), (60.0, 1_500)):
        bench.do(
            leases.record_event,
            bench.running(),
            code="METRICS",
            message="m",
            data={},
            type="metrics",
            stage="reft",
            progress={"step": 90, "total_steps": 100, "eta_seconds": eta},
            metrics={
                "lora": {"step": 50, "tokens": 1, "seconds": 1.0},
                "reft": {"step": 90, "tokens": tokens, "seconds": 10.0},
            },
        )
    bench.running()  # has said nothing yet
    statistics = bench.do(job_statistics.jobs)
    assert statistics.step_seconds == {"reft": 4.0}
    assert statistics.tokens_per_second == {"reft": 200.0}
