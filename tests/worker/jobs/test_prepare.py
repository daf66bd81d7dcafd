"""Validating a job's files, with a fake engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from worker_bench import OWNER, Bench, eventually

from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Job
from store.jobs import jobs
from store.messages.broker import Task
from store.ops import workers
from worker.jobs.prepare import prepare_job


def test_good_files_queue_the_job_and_tell_the_trainers(bench: Bench, sent: list[tuple[str, ...]]) -> None:
    job_id = bench.created(_lines([{"do": "metrics", "step": 1}]))
    job = prepare_job(bench.context, job_id)
    assert job is not None
    assert job.state == JobState.QUEUED
    assert job.validation is not None
    assert job.validation["files"]["training_file"] == {"rows": 1, "reference": job.spec["training_file"]}
    assert bench.codes(job_id) == ["CREATED", "VALIDATION_COMPLETE", "QUEUED"]
    assert sent == [(Task.TRAIN, job_id)]


def test_a_checker_that_dies_is_tried_again_and_then_given_up(bench: Bench) -> None:
    job_id = bench.created(_lines([{"do": "die", "code": 3, "when": "checked"}]))
    states = [_prepared(bench, job_id).state for _ in range(3)]
    assert states == [JobState.VALIDATING_FILES, JobState.VALIDATING_FILES, JobState.FAILED]


def test_cancel_ends_a_check_at_once(bench: Bench) -> None:
    job_id = bench.created(_lines([{"do": "silent", "when": "checked"}]))
    attempt: Future[Job | None] = bench.pool.submit(prepare_job, bench.context, job_id)
    eventually(lambda: bench.job(job_id).worker_id == bench.context.worker_id)
    with transaction(bench.context.sessions) as session:
        assert jobs.request_cancel(session, owner_id=OWNER, job_id=job_id).state == JobState.CANCELLED
    assert attempt.result(60) is None


def test_a_worker_that_stops_leaves_the_check_to_another(bench: Bench) -> None:
    job_id = bench.created(_lines([{"do": "silent", "when": "checked"}]))
    attempt: Future[Job | None] = bench.pool.submit(prepare_job, bench.context, job_id)
    eventually(lambda: bench.job(job_id).worker_id == bench.context.worker_id)
    bench.context.stopping.set()
    job = attempt.result(60)
    assert job is not None
    assert (job.state, job.worker_id, job.trainer_deaths) == (JobState.VALIDATING_FILES, None, 0)


def test_bad_rows_fail_the_job_and_are_in_its_report(bench: Bench) -> None:
    """tests/e2e has the same with the real engine."""
    rows = [{"do": "metrics", "step": 1}, {"do": "refuse", "field": "answer", "when": "checked"}]
    job = _prepared(bench, bench.created(_lines(rows)))
    assert job.state == JobState.FAILED
    assert job.error == {"code": "invalid_training_file", "message": "line 2", "param": "training_file"}
    assert job.validation is not None
    (fault,) = job.validation["faults"]
    assert (fault["file"], fault["line"], fault["field"]) == ("training_file", 2, "answer")
    assert job.validation["files"]["training_file"]["reference"] == job.spec["training_file"]


def test_what_is_no_matter_of_rows_fails_the_job_too(bench: Bench) -> None:
    act = {"do": "fail", "code": "model_not_found", "message": "there is no model 'x'", "when": "checked"}
    job = _prepared(bench, bench.created(_lines([act])))
    assert job.state == JobState.FAILED
    assert job.error == {"code": "model_not_found", "message": "there is no model 'x'", "param": None}


def test_a_reason_that_postgres_can_not_store_fails_the_job_once(bench: Bench) -> None:
    act = {
        "do": "fail",
        "code": "invalid_training_file",
        "message": "unknown field \0 \ud800",
        "when": "checked",
    }
    job = _prepared(bench, bench.created(_lines([act])))
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["message"] == "unknown field \ufffd \ufffd"


def test_a_dry_run_ends_with_its_estimate_and_tells_no_trainer(
    bench: Bench, sent: list[tuple[str, ...]]
) -> None:
    machine = {"gpus": 0, "gpu_bytes": 0, "host_bytes": 8 * 10**9, "auto_dtype": "float32"}
    with transaction(bench.context.sessions) as session:
        workers.register(session, worker_id="train-1", role="train", info={"machine": machine})
    job = _prepared(bench, bench.created(_lines([{"do": "metrics", "step": 1}]), dry_run=True))
    assert job.state == JobState.SUCCEEDED
    assert job.fine_tuned_model is None
    assert job.validation is not None
    estimate = job.validation["estimate"]
    assert (estimate["machine"], estimate["stages"][0]["type"], estimate["steps"]) == (machine, "lora", 6)
    assert sent == []


def _prepared(bench: Bench, job_id: str) -> Job:
    prepare_job(bench.context, job_id)
    return bench.job(job_id)


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
