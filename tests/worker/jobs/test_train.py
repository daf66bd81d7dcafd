"""One attempt at training a job, with a fake engine: every way in which it can end."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from worker_bench import FAKE_ENGINE, OWNER, Bench, eventually, gone

from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Job
from store.errors import Unavailable
from store.jobs import jobs, leases, reconcile
from worker.jobs import publish

STEPS = [{"do": "metrics", "step": 1}, {"do": "metrics", "step": 2}]


def test_a_job_that_succeeds(bench: Bench) -> None:
    job_id = bench.queued(
        [
            {"do": "eval", "accuracy": 0.5},
            *STEPS,
            {"do": "say", "text": "Loading weights"},
            {"do": "checkpoint", "kind": "stage", "step": 3},
            {"do": "metrics", "step": 10},
        ]
    )
    job = bench.run(job_id)
    assert job.state == JobState.SUCCEEDED
    assert job.fine_tuned_model == f"ft:tiny:{OWNER}::{job_id[-8:]}"
    assert job.evaluation == {"n": 2, "metric": "accuracy", "split": "validation", "results": []}
    assert (job.parity, job.trained_tokens, job.worker_id, job.lease_until) == ({"lora": 0.0}, 80, None, None)
    assert job.resolved == {"learning_rate": 0.001, "device": "cpu"}
    assert job.progress["percent"] == 100.0
    assert job.metrics["lora"]["step"] == 10
    assert job.metrics["base"] == {"accuracy": 0.5}
    codes = bench.codes(job_id)
    assert codes[-1] == "SUCCEEDED"
    assert codes.count("STARTED") == codes.count("SUCCEEDED") == 1
    (checkpoint,) = bench.checkpoints(job_id)
    assert checkpoint.model_id == f"{job.fine_tuned_model}:ckpt-lora"


def test_a_checkpoint_has_the_metrics_of_its_step(bench: Bench) -> None:
    of_step = {"train_loss": 0.5, "learning_rate": 0.001}
    at_end = {"train_loss": 0.25, "eval_loss": 0.75, "accuracy": 0.9}
    job_id = bench.queued(
        [
            *STEPS,
            {"do": "checkpoint", "step": 2, "metrics": of_step},
            {"do": "checkpoint", "step": 3, "kind": "stage", "metrics": at_end},
            {"do": "checkpoint", "step": 4},
        ]
    )
    assert bench.run(job_id).state == JobState.SUCCEEDED
    metrics = {checkpoint.step: checkpoint.metrics for checkpoint in bench.checkpoints(job_id)}
    assert metrics == {2: of_step, 3: at_end, 4: {}}


def test_the_model_of_an_epoch_is_stored_and_replaced_by_newer_ones(bench: Bench) -> None:
    acts = [{"do": "checkpoint", "step": step, "kind": "epoch"} for step in (1, 2, 3)]
    job_id = bench.queued([*STEPS, *acts], n_checkpoints=2)
    job = bench.run(job_id)
    assert job.state == JobState.SUCCEEDED
    first, *kept = bench.checkpoints(job_id)
    assert (first.step, first.removed_at is None) == (1, False)
    assert [(checkpoint.step, checkpoint.removed_at) for checkpoint in kept] == [(2, None), (3, None)]
    assert kept[0].model_id == f"{job.fine_tuned_model}:ckpt-step-2"
    artifacts = bench.context.artifacts
    assert "bundle" in artifacts.children(first.storage_key), "a worker may be reading it"
    assert "heft.json" in artifacts.children(f"{kept[0].storage_key}/bundle")


def test_every_step_is_in_the_result_file(bench: Bench) -> None:
    acts = [{"do": "metrics", "step": step} for step in range(1, 11)]
    job_id = bench.queued([{"do": "eval", "accuracy": 0.5}, *acts])
    job = bench.run(job_id)
    metrics = [event for event in bench.events(job_id) if event.type == "metrics"]
    assert len(metrics) < 10, "events are throttled"
    assert metrics[-1].data["step"] == 10
    table = bench.results(job)
    assert [(line["stage"], line["accuracy"]) for line in table[:1]] == [("base", "0.5")]
    assert [float(line["train_loss"]) for line in table[1:]] == [1 / step for step in range(1, 11)]


def test_a_user_error_fails_the_job_at_once(bench: Bench) -> None:
    message = "the loss is not a number: lower lora.learning_rate"
    job_id = bench.queued([*STEPS, {"do": "fail", "code": "diverged", "message": message}])
    job = bench.run(job_id)
    assert job.state == JobState.FAILED
    assert job.error == {"code": "diverged", "message": message, "param": None}
    assert bench.outcomes(job_id) == ["failed"]


def test_an_unavailable_hub_is_tried_again(bench: Bench) -> None:
    job_id = bench.queued([{"do": "fail", "code": "hub_unavailable", "message": "no answer"}])
    assert bench.run(job_id).state == JobState.QUEUED
    assert bench.outcomes(job_id) == ["trainer_died"]


def test_an_epoch_s_model_does_not_delay_the_checkpoint_to_resume_from(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both come at the end of an epoch, the model first."""
    clock = chain([0.0], repeat(100.0))
    monkeypatch.setattr(publish, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    acts = [{"do": "checkpoint", "step": 1, "kind": "epoch"}, {"do": "checkpoint", "step": 1}]
    job_id = bench.queued([{"do": "metrics", "step": 1}, *acts])
    bench.run(job_id, bench.with_settings(checkpoint_seconds=300))
    assert [checkpoint.kind for checkpoint in bench.checkpoints(job_id)] == ["epoch", "step"]


def test_a_trainer_that_dies_is_resumed_from_its_checkpoint(bench: Bench) -> None:
    job_id = bench.queued(
        [
            *STEPS,
            {"do": "checkpoint", "step": 2},
            {"do": "die", "code": 9, "once": True},
            {"do": "metrics", "step": 3},
        ]
    )
    job = bench.run(job_id)
    assert (job.state, job.trainer_deaths, job.attempt) == (JobState.QUEUED, 1, 2)
    assert "exit code 9" in bench.events(job_id)[-1].message
    job = bench.run(job_id)
    assert job.state == JobState.SUCCEEDED
    assert bench.outcomes(job_id) == ["trainer_died", "succeeded"]
    assert _steps_of_results(bench, job) == [1, 2, 3], "the history is part of the checkpoint"


def test_a_damaged_checkpoint_is_skipped(bench: Bench) -> None:
    job_id = bench.queued(
        [
            *({"do": "metrics", "step": 1}, {"do": "checkpoint", "step": 1}),
            *({"do": "metrics", "step": 2}, {"do": "checkpoint", "step": 2}),
            *({"do": "die", "code": 9, "once": True}, {"do": "metrics", "step": 3}),
        ]
    )
    bench.run(job_id)
    newest = bench.checkpoints(job_id)[-1]
    bench.context.artifacts.put_stream(f"{newest.storage_key}/state.json", [b"{}"])
    job = bench.run(job_id)
    assert job.state == JobState.SUCCEEDED
    (warning,) = [event for event in bench.events(job_id) if event.data["code"] == "WARNING"]
    assert warning.data["checkpoint"] == newest.id
    assert _steps_of_results(bench, job) == [1, 2, 3], "step 2 was trained again, on the checkpoint of step 1"


def test_three_deaths_without_a_new_checkpoint_end_the_job(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "die", "code": -9}])
    states = [bench.run(job_id).state for _ in range(3)]
    assert states == [JobState.QUEUED, JobState.QUEUED, JobState.FAILED]
    job = bench.job(job_id)
    assert job.error is not None
    assert job.error["code"] == "out_of_memory"
    assert "max_length" in job.error["message"]
    assert bench.outcomes(job_id) == ["trainer_died"] * 3


def test_a_new_checkpoint_resets_the_crash_count(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "checkpoint", "step": 2}, {"do": "die", "code": 1}])
    bench.run(job_id)
    bench.run(job_id)
    assert bench.job(job_id).trainer_deaths == 2
    assert bench.run(job_id).state == JobState.FAILED


def test_cancel_ends_the_trainer_and_its_children(bench: Bench, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    job_id = bench.queued([*STEPS, {"do": "straggle", "path": str(pid_file)}, {"do": "wait"}])
    attempt = bench.start(job_id)
    eventually(lambda: pid_file.exists() and pid_file.read_text())
    _request(bench, job_id, jobs.request_cancel)
    attempt.result(60)
    job = bench.job(job_id)
    assert job.state == JobState.CANCELLED
    assert bench.codes(job_id)[-1] == "CANCELLED"
    assert bench.checkpoints(job_id) == [], "a cancelled job writes no checkpoint"
    straggler = int(pid_file.read_text())
    eventually(lambda: gone(straggler))


def test_cancel_kills_a_trainer_that_ignores_sigterm(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "stubborn"}])
    attempt = bench.start(job_id, bench.with_settings(cancel_grace_seconds=0.3))
    bench.saw(job_id, "METRICS")
    _request(bench, job_id, jobs.request_cancel)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.CANCELLED


def test_pause_keeps_a_checkpoint_and_resume_continues(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "wait", "step": 2}, {"do": "metrics", "step": 3}])
    attempt = bench.start(job_id)
    bench.saw(job_id, "METRICS")
    _request(bench, job_id, jobs.request_pause)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.PAUSED
    assert [checkpoint.step for checkpoint in bench.checkpoints(job_id)] == [2]
    assert bench.run(job_id).state == JobState.PAUSED, "a hint changes nothing while it is paused"
    _request(bench, job_id, jobs.resume)
    job = bench.run(job_id)
    assert job.state == JobState.SUCCEEDED
    assert _steps_of_results(bench, job) == [1, 2, 3]


def test_pause_kills_a_trainer_that_ignores_sigterm(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "checkpoint", "step": 2}, {"do": "stubborn"}])
    attempt = bench.start(job_id, bench.with_settings(checkpoint_grace_seconds=0.3))
    bench.saw(job_id, "CHECKPOINT_SAVED")
    _request(bench, job_id, jobs.request_pause)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.PAUSED
    assert [checkpoint.step for checkpoint in bench.checkpoints(job_id)] == [2], (
        "the earlier checkpoint remains"
    )


def test_a_worker_that_stops_puts_the_job_back_with_a_checkpoint(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "wait", "step": 2}, {"do": "metrics", "step": 3}])
    attempt = bench.start(job_id)
    bench.saw(job_id, "METRICS")
    bench.context.stopping.set()
    attempt.result(60)
    assert bench.job(job_id).state == JobState.QUEUED
    assert [checkpoint.step for checkpoint in bench.checkpoints(job_id)] == [2]
    assert bench.run(job_id).state == JobState.QUEUED, "a worker that stops claims nothing"
    bench.context.stopping.clear()
    job = bench.run(job_id)
    assert job.state == JobState.SUCCEEDED
    assert (job.trainer_deaths, job.lost_leases) == (0, 0)
    assert bench.outcomes(job_id) == ["released", "succeeded"]


def test_a_lost_fence_kills_the_trainer_and_writes_nothing(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "wait"}])
    attempt = bench.start(job_id)
    bench.saw(job_id, "METRICS")
    (trainer,) = [child for child in psutil.Process().children() if FAKE_ENGINE[1] in child.cmdline()]
    other = replace(bench.context, worker_id="worker-2")
    with transaction(bench.context.sessions) as session:
        reconcile.take_back_from(session, worker_id="worker-1")
        claim = leases.claim(session, job_id=job_id, worker_id=other.worker_id, purpose="train")
    assert claim is not None
    before = bench.codes(job_id)
    assert attempt.result(60) is None
    assert not trainer.is_running()
    job = bench.job(job_id)
    assert (job.state, job.worker_id, job.attempt) == (JobState.RUNNING, "worker-2", claim.attempt)
    assert bench.codes(job_id) == before
    assert bench.checkpoints(job_id) == []


def test_a_trainer_that_stalls_shows_its_stacks_and_counts_as_dead(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    context = bench.with_settings(stall_seconds=1.0)
    job_id = bench.queued([*STEPS, {"do": "silent"}])
    assert bench.run(job_id, context).state == JobState.QUEUED
    assert "made no progress" in bench.events(job_id)[-1].message
    assert "in silent" in caplog.text, "faulthandler named the function"
    assert bench.outcomes(job_id) == ["trainer_died"]


def test_a_repeated_message_loses_the_claim(bench: Bench) -> None:
    job_id = bench.queued([*STEPS, {"do": "wait"}])
    attempt = bench.start(job_id)
    bench.saw(job_id, "STARTED")
    assert bench.run(job_id).attempt == 2, "one claim for validation and one for training"
    _request(bench, job_id, jobs.request_cancel)
    attempt.result(60)


def test_an_error_of_the_worker_does_not_hold_the_job(bench: Bench) -> None:
    context = replace(bench.context, engine_command=("/nowhere/python",))
    job_id = bench.queued(STEPS)
    with pytest.raises(FileNotFoundError):
        bench.run(job_id, context)
    assert bench.job(job_id).state == JobState.QUEUED
    assert bench.outcomes(job_id) == ["trainer_died"]


def _request(bench: Bench, job_id: str, request: Any) -> None:
    with transaction(bench.context.sessions) as session:
        request(session, owner_id=OWNER, job_id=job_id)


def _steps_of_results(bench: Bench, job: Job) -> list[int]:
    return [int(line["step"]) for line in bench.results(job)]


def test_a_missing_or_incomplete_checkpoint_is_not_committed(bench: Bench) -> None:
    job_id = bench.queued(
        [
            *STEPS,
            {"do": "checkpoint", "step": 2, "spoil": "remove"},
            {"do": "checkpoint", "step": 3, "spoil": "cut"},
            {"do": "checkpoint", "step": 4},
        ]
    )
    assert bench.run(job_id).state == JobState.SUCCEEDED
    assert [checkpoint.step for checkpoint in bench.checkpoints(job_id)] == [4]


def test_cancel_ends_a_job_while_the_storage_is_full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def full(*_: object) -> dict[str, str]:
        tried.set()
        raise Unavailable("no space left")

    monkeypatch.setattr(bench.context.artifacts, "put_directory", full)
    job_id = bench.queued([*STEPS, {"do": "checkpoint", "step": 1, "kind": "stage"}, {"do": "wait"}])
    attempt = bench.start(job_id)
    assert tried.wait(60)
    _request(bench, job_id, jobs.request_cancel)
    attempt.result(60)
    assert bench.job(job_id).state == JobState.CANCELLED
