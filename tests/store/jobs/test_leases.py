"""The worker's side: the claim, the fence, events, checkpoints, and every way a job is let go of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from store import models
from store.db.states import JobState
from store.errors import LostFence, NotFound
from store.jobs import checkpoints, endings, jobs, leases
from store.jobs.spec import TrainingSpec
from store.storage import files
from store.storage.files import NewFile

OWNER = "team"
SHA = "0" * 64
BOOM = {"code": "diverged", "message": "The loss is not a number.", "param": None}
DEAD = {"code": "trainer_died", "message": "The training process ended without a word.", "param": None}

#: Every write of a claimed job.
WRITES = {
    "heartbeat": lambda bench, claim: bench.do(leases.heartbeat, claim),
    "wishes": lambda bench, claim: bench.do(leases.read_stop_request, claim),
    "event": lambda bench, claim: bench.do(leases.record_event, claim, code="METRICS", message="step 1"),
    "checkpoint": lambda bench, claim: bench.checkpoint(claim, 1),
    "succeeded": lambda bench, claim: bench.succeed(claim),
    "failed": lambda bench, claim: bench.do(endings.finish_failed, claim, error=BOOM),
    "cancelled": lambda bench, claim: bench.do(endings.finish_cancelled, claim),
    "paused": lambda bench, claim: bench.do(endings.finish_paused, claim),
    "released": lambda bench, claim: bench.do(endings.release, claim),
    "died": lambda bench, claim: bench.do(endings.record_crash, claim, error=DEAD),
}


def test_a_claim_takes_a_lease_and_raises_the_attempt(bench) -> None:
    job = bench.queued()
    claim = bench.claim(job.id, worker_id="worker-7")
    claimed = bench.get(job.id)
    assert (claimed.state, claimed.attempt, claimed.worker_id) == (JobState.RUNNING, 2, "worker-7")
    assert claim.attempt == 2  # the first was the checking of its files
    assert claim.spec == bench.spec
    assert claim.checkpoints == ()
    assert claimed.started_at is not None
    assert claimed.lease_until is not None
    assert 50 < (claimed.lease_until - claimed.started_at).total_seconds() <= 60
    assert bench.attempt(job.id, 2).worker_id == "worker-7"
    assert bench.outcomes(job.id) == ["prepared", None]


@pytest.mark.parametrize("state", sorted(JobState))
@pytest.mark.parametrize("purpose", ["prepare", "train"])
def test_only_a_waiting_job_is_claimed(bench, state: JobState, purpose: str) -> None:
    job = bench.in_state(state)
    claim = bench.do(leases.claim, job_id=job.id, worker_id="w", purpose=purpose)
    waits = (state, purpose) in {(JobState.VALIDATING_FILES, "prepare"), (JobState.QUEUED, "train")}
    assert (claim is not None) == waits
    if not waits:
        assert bench.get(job.id).attempt == job.attempt


def test_the_job_that_has_waited_longest(bench) -> None:
    assert bench.do(leases.longest_waiting, purpose="train") is None
    first, second = bench.queued(), bench.queued()
    bench.sql("UPDATE jobs SET created_at = now() - interval '1 minute' WHERE id = :id", id=first.id)
    assert bench.do(leases.longest_waiting, purpose="train") == first.id
    bench.sql("UPDATE jobs SET not_before = now() + interval '1 minute' WHERE id = :id", id=first.id)
    assert bench.do(leases.longest_waiting, purpose="train") == second.id
    bench.claim(second.id)
    assert bench.do(leases.longest_waiting, purpose="train") is None
    assert bench.do(leases.longest_waiting, purpose="prepare") is None


def test_files_being_checked_are_not_checked_twice(bench) -> None:
    claim = bench.claim(bench.job().id)
    assert bench.do(leases.claim, job_id=claim.job_id, worker_id="other", purpose="prepare") is None


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("stale", ["earlier attempt", "taken back", "other worker"])
def test_a_stale_attempt_can_write_nothing(bench, write: str, stale: str) -> None:
    claim = bench.running()
    job_id = claim.job_id
    if stale == "other worker":
        claim = replace(claim, worker_id="someone-else")
    else:
        bench.do(endings.release, claim)
        if stale == "earlier attempt":
            bench.claim(job_id)
    before = bench.get(job_id)
    with pytest.raises(LostFence):
        WRITES[write](bench, claim)
    unchanged = bench.get(job_id)
    assert (unchanged.state, unchanged.attempt, unchanged.event_seq, unchanged.lease_until) == (
        before.state,
        before.attempt,
        before.event_seq,
        before.lease_until,
    )
    assert bench.sql("SELECT * FROM checkpoints") == []
    assert bench.sql("SELECT * FROM models") == []


def test_a_checker_of_files_whose_job_was_taken_back_can_write_nothing(bench) -> None:
    claim = bench.claim(bench.job().id)
    bench.do(endings.release, claim)  # same state, same attempt number: only its worker is gone
    with pytest.raises(LostFence):
        bench.do(endings.finish_prepared, claim, report={})
    assert bench.get(claim.job_id).state == JobState.VALIDATING_FILES


def test_a_heartbeat_renews_the_lease_and_tells_what_is_wanted(bench) -> None:
    claim = bench.running()
    bench.expire(claim.job_id)  # expired, but nobody took it back: still ours
    wishes = bench.do(leases.heartbeat, claim)
    assert (wishes.cancel, wishes.pause) == (False, False)
    assert bench.sql("SELECT lease_until > now() AS renewed FROM jobs")[0].renewed
    bench.do(jobs.request_pause, owner_id=OWNER, job_id=claim.job_id)
    assert bench.do(leases.heartbeat, claim).pause


def test_an_event_brings_what_the_job_shows(bench) -> None:
    claim = bench.running()
    record = {"code": "METRICS", "message": "step 4", "type": "metrics", "data": {"loss": 0.7}}
    bench.do(
        leases.record_event,
        claim,
        **record,
        stage="lora",
        progress={"step": 4, "total_steps": 8},
        metrics={"lora": {"loss": 0.7}},
        resolved={"dtype": "float32"},
    )
    job = bench.do(leases.record_event, claim, **record, metrics={"reft": {"loss": 0.5}})
    assert job.stage == "lora"
    assert job.progress == {"step": 4, "total_steps": 8}
    assert job.metrics == {"lora": {"loss": 0.7}, "reft": {"loss": 0.5}}
    assert job.resolved == {"dtype": "float32"}
    last = bench.events(job.id)[-1]
    assert (last.type, last.message, last.attempt) == ("metrics", "step 4", claim.attempt)
    assert last.data == {"code": "METRICS", "loss": 0.7}


def test_two_step_checkpoints_are_kept_the_newest_first(bench) -> None:
    claim = bench.running()
    assert bench.checkpoint(claim, 10) == []
    assert bench.checkpoint(claim, 20) == []
    assert bench.checkpoint(claim, 30) == [f"jobs/{claim.job_id}/{claim.attempt}/step-10"]
    bench.do(endings.release, claim)
    again = bench.claim(claim.job_id)
    assert [checkpoint.step for checkpoint in again.checkpoints] == [30, 20]


def test_a_checkpoint_has_its_metrics(bench) -> None:
    claim = bench.running()
    metrics = {"step": 20, "train_loss": 0.25, "valid_loss": 0.5}
    bench.checkpoint(claim, 10)
    bench.checkpoint(claim, 20, "stage", metrics=metrics)
    bench.checkpoint(claim, 20, "stage", metrics={"train_loss": 9.0})  # committed already
    rows = bench.sql("SELECT step, metrics FROM checkpoints ORDER BY step")
    assert [(row.step, row.metrics) for row in rows] == [(10, {}), (20, metrics)]
    page = bench.do(jobs.list_checkpoints, owner_id=OWNER, job_id=claim.job_id)
    assert [checkpoint.metrics for checkpoint in page.items] == [metrics]


def test_a_stage_end_is_newer_than_the_step_before_it_and_stays(bench) -> None:
    claim = bench.running()
    for step in (10, 20):
        bench.checkpoint(claim, step)
    bench.checkpoint(claim, 20, "stage")
    bench.do(endings.release, claim)
    again = bench.claim(claim.job_id)
    assert [(row.step, row.kind) for row in again.checkpoints] == [(20, "stage"), (20, "step")]


def test_an_attempt_that_fell_back_goes_on_from_its_own_checkpoints(bench) -> None:
    claim = bench.running()
    for step in (10, 20):
        bench.checkpoint(claim, step)
    bench.do(endings.release, claim)
    fell_back = bench.claim(claim.job_id)  # its 20 is damaged: it starts from 10 and gets to 15
    bench.checkpoint(fell_back, 15)
    bench.do(endings.release, fell_back)
    assert [row.step for row in bench.claim(claim.job_id).checkpoints] == [15, 20]


def test_a_checkpoint_recorded_twice_is_one(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10)
    assert bench.checkpoint(claim, 10) == []  # the commit was seen, its answer was not
    assert bench.checkpoint(claim, 10, storage_key="elsewhere") == ["elsewhere"]
    assert bench.codes(claim.job_id).count("CHECKPOINT_SAVED") == 1


def test_the_models_of_equal_stages_have_names_of_their_own(bench) -> None:
    from store.jobs.spec import Method, TrainingSpec

    method = Method.model_validate(
        {"type": "recipe", "recipe": {"stages": [{"type": "lora"}, {"type": "reft"}, {"type": "lora"}]}}
    )
    spec = TrainingSpec(model="org/name@abc", training_file="sample:passages", seed=1, method=method)
    job = bench.do(jobs.create, owner_id=OWNER, spec=spec)
    bench.do(endings.finish_prepared, bench.claim(job.id), report={})
    claim = bench.claim(job.id)
    for index, stage in enumerate(("lora", "reft", "lora")):
        bench.checkpoint(claim, 10 * (index + 1), "stage", stage=stage, stage_index=index)
    names = [row.id for row in bench.sql("SELECT id FROM models ORDER BY created_at")]
    final = f"ft:org/name@abc:team::{job.id[-8:]}"
    assert names == [f"{final}:ckpt-lora-1", f"{final}:ckpt-reft", f"{final}:ckpt-lora-3"]


def test_the_model_of_a_stage_end_is_the_bundle_inside_the_checkpoint(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10, "stage", task={"type": "yes_no"})
    [event] = [e for e in bench.events(claim.job_id) if e.data["code"] == "CHECKPOINT_SAVED"]
    model = bench.do(models.get, owner_id=OWNER, model_id=event.data["model"])
    assert model.kind == "checkpoint"
    assert model.storage_key == f"jobs/{claim.job_id}/{claim.attempt}/stage-10/bundle"
    assert model.manifest == {"heft.json": SHA}
    assert model.task == {"type": "yes_no"}


def epochs(bench, claim) -> list[tuple[int, str]]:
    """(step, id of the model) of the job's checkpoints, newest first."""
    page = bench.do(jobs.list_checkpoints, owner_id=OWNER, job_id=claim.job_id)
    return [(checkpoint.step, checkpoint.model_id) for checkpoint in page.items]


def test_the_newest_models_of_epochs_are_kept_and_the_best_one(bench) -> None:
    claim = bench.running()
    losses = {10: 0.9, 20: 0.5, 30: 0.6, 40: 0.7, 50: 0.8}
    for step, loss in losses.items():
        assert bench.checkpoint(claim, step, "epoch", metrics={"valid_loss": loss}) == [], (
            "files stay for a while"
        )
    prefix = f"jobs/{claim.job_id}/{claim.attempt}/epoch"
    listed = epochs(bench, claim)
    assert [step for step, _ in listed] == [50, 40, 30, 20]
    assert listed[-1][1].endswith(":ckpt-step-20")
    model = bench.do(models.get, owner_id=OWNER, model_id=listed[-1][1])
    assert (model.kind, model.storage_key) == ("checkpoint", f"{prefix}-20/bundle")
    with pytest.raises(NotFound):
        bench.do(models.get, owner_id=OWNER, model_id=listed[-1][1].replace("20", "10"))
    best = bench.do(checkpoints.best, claim.job_id)
    assert [row.step for row in bench.sql("SELECT step FROM checkpoints WHERE id = :id", id=best)] == [20]

    bench.checkpoint(claim, 60, "stage", metrics={"valid_loss": 0.4})
    assert [step for step, _ in epochs(bench, claim)] == [60, 50, 40, 30], "20 is not the best any more"
    bench.checkpoint(claim, 70, "epoch", metrics={"valid_loss": 0.6})
    assert [step for step, _ in epochs(bench, claim)] == [70, 60, 50, 40]


@pytest.mark.parametrize(
    ("metric", "best_step"),
    [(None, 30), ("valid_accuracy", 30), ("valid_loss", 10), ("valid_mean_token_accuracy", 20)],
)
def test_the_best_model_is_that_of_the_metric(bench, metric: str | None, best_step: int) -> None:
    """Without early stopping by another one, it is the task's: the share of right answers, then the loss."""
    stopping = {"early_stopping": {"metric": metric}} if metric else {}
    fields = {**bench.spec.model_dump(), "n_checkpoints": 1, **stopping}
    claim = replace(bench, spec=TrainingSpec.model_validate(fields)).running()
    figures = {10: (0.1, 0.5, 0.5), 20: (0.5, 0.9, 0.75), 30: (0.4, 0.5, 0.75), 40: (0.6, 0.4, 0.5)}
    for step, (loss, token_accuracy, accuracy) in figures.items():
        metrics = {
            "valid_loss": loss,
            "valid_mean_token_accuracy": token_accuracy,
            "valid_accuracy": accuracy,
        }
        bench.checkpoint(claim, step, "epoch", metrics=metrics)
    assert [step for step, _ in epochs(bench, claim)] == [40, best_step]


def test_a_deleted_model_of_an_epoch_is_not_one_of_the_newest(bench) -> None:
    claim = bench.running()
    for step in (10, 20, 30):
        bench.checkpoint(claim, step, "epoch")
    bench.do(models.delete, owner_id=OWNER, model_id=epochs(bench, claim)[0][1])
    bench.checkpoint(claim, 40, "epoch")
    assert [step for step, _ in epochs(bench, claim)] == [40, 20, 10]


def test_no_attempt_resumes_from_an_epoch_s_model(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10)
    bench.sql("UPDATE jobs SET trainer_deaths = 2")
    bench.checkpoint(claim, 20, "epoch")
    assert bench.get(claim.job_id).trainer_deaths == 2
    bench.do(endings.release, claim)
    assert [row.step for row in bench.claim(claim.job_id).checkpoints] == [10]


def test_an_epoch_that_is_reached_again_keeps_its_first_model(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 20, "epoch")
    bench.do(endings.release, claim)
    again = bench.claim(claim.job_id)
    key = f"jobs/{claim.job_id}/{again.attempt}/epoch-20"
    assert bench.checkpoint(again, 20, "epoch") == [key]
    (checkpoint,) = epochs(bench, claim)
    assert bench.do(models.get, owner_id=OWNER, model_id=checkpoint[1]).storage_key != f"{key}/bundle"


def test_the_end_of_a_stage_that_is_reached_again_is_listed_once(bench) -> None:
    """The second checkpoint is one to resume from, and goes with the job's end."""
    claim = bench.running()
    bench.checkpoint(claim, 20, "stage")
    bench.do(endings.release, claim)
    again = bench.claim(claim.job_id)
    bench.checkpoint(again, 10)
    bench.checkpoint(again, 20, "stage")
    (listed,) = epochs(bench, claim)
    model = bench.do(models.get, owner_id=OWNER, model_id=listed[1])
    assert model.storage_key == f"jobs/{claim.job_id}/{claim.attempt}/stage-20/bundle"
    bench.do(endings.release, again)
    last = bench.claim(claim.job_id)
    assert [(row.attempt, row.step) for row in last.checkpoints] == [(again.attempt, 20), (again.attempt, 10)]
    bench.succeed(last)
    remaining = bench.sql("SELECT attempt, kind FROM checkpoints WHERE removed_at IS NULL")
    assert [(row.attempt, row.kind) for row in remaining] == [(claim.attempt, "stage")]


def test_success_sets_state_model_file_and_event_together(bench) -> None:
    claim = bench.running()
    bench.checkpoint(claim, 10)
    result_file = NewFile(
        file_id="file-r", filename="result.csv", size=9, sha256=SHA, storage_key="jobs/r.csv"
    )
    job = bench.do(
        endings.finish_succeeded,
        claim,
        storage_key="jobs/bundle",
        manifest={"heft.json": SHA},
        task={"type": "yes_no"},
        result={"evaluation": {"n": 3}, "parity": None, "trained_tokens": 77},
        result_file=result_file,
    )
    assert job.state == JobState.SUCCEEDED
    assert job.fine_tuned_model == f"ft:smollm2-135m:team:boolq:{job.id[-8:]}"
    assert (job.evaluation, job.parity, job.trained_tokens) == ({"n": 3}, None, 77)
    assert (job.worker_id, job.lease_until, job.stage) == (None, None, None)
    assert job.finished_at is not None
    assert bench.do(models.get, owner_id=OWNER, model_id=job.fine_tuned_model).storage_key == "jobs/bundle"
    assert bench.do(files.get, owner_id=OWNER, file_id="file-r").purpose == files.RESULTS_PURPOSE
    assert bench.codes(job.id)[-1] == "SUCCEEDED"
    assert bench.outcomes(job.id) == ["prepared", "succeeded"]
    # Nothing resumes from a step checkpoint any more; an absent record is SQL's NULL, not JSON's.
    assert bench.sql("SELECT count(*) AS n FROM checkpoints WHERE removed_at IS NULL")[0].n == 0
    assert bench.sql("SELECT parity IS NULL AS absent FROM jobs")[0].absent


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled", "paused", "released", "died"])
def test_a_run_that_was_told_to_cancel_ends_as_cancelled(bench, end: str) -> None:
    claim = bench.running()
    bench.do(jobs.request_cancel, owner_id=OWNER, job_id=claim.job_id)
    job = WRITES[end](bench, claim)
    assert job.state == JobState.CANCELLED
    assert bench.codes(job.id)[-1] == "CANCELLED"
    assert bench.outcomes(job.id) == ["prepared", "cancelled"]
    assert bench.sql("SELECT * FROM models") == []


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ("succeeded", JobState.SUCCEEDED),
        ("failed", JobState.FAILED),
        ("paused", JobState.PAUSED),
        ("released", JobState.PAUSED),
        ("died", JobState.PAUSED),
    ],
)
def test_a_run_that_was_told_to_pause_pauses_if_it_would_go_on(bench, end: str, state: JobState) -> None:
    claim = bench.running()
    bench.do(jobs.request_pause, owner_id=OWNER, job_id=claim.job_id)
    job = WRITES[end](bench, claim)
    assert job.state == state
    if state == JobState.PAUSED:
        assert (job.paused_from, job.pause_requested_at) == (JobState.QUEUED, None)
        assert bench.do(jobs.resume, owner_id=OWNER, job_id=job.id).state == JobState.QUEUED


def test_a_released_job_waits_again_at_no_cost(bench) -> None:
    claim = bench.running()
    job = bench.do(endings.release, claim)
    assert (job.state, job.trainer_deaths, job.lost_leases) == (JobState.QUEUED, 0, 0)
    assert bench.codes(job.id)[-1] == "RESTARTED"
    assert bench.claim(job.id).attempt == claim.attempt + 1


def test_a_trainer_that_dies_is_tried_again_after_growing_pauses_then_fails(bench) -> None:
    job_id = bench.queued().id
    pauses = []
    for _ in range(2):
        job = bench.do(endings.record_crash, bench.claim(job_id), error=DEAD)
        assert job.state == JobState.QUEUED
        assert bench.do(leases.claim, job_id=job_id, worker_id="w", purpose="train") is None
        [row] = bench.sql("SELECT extract(epoch FROM not_before - now())::float AS pause FROM jobs")
        pauses.append(row.pause)
        bench.sql("UPDATE jobs SET not_before = now()")
    assert 8 < pauses[0] <= 10
    assert 38 < pauses[1] <= 40
    job = bench.do(endings.record_crash, bench.claim(job_id), error=DEAD)
    assert (job.state, job.error, job.trainer_deaths) == (JobState.FAILED, DEAD, 3)
    assert bench.codes(job_id)[-1] == "FAILED"
    assert bench.outcomes(job_id) == ["prepared", "trainer_died", "trainer_died", "trainer_died"]


def test_a_new_checkpoint_forgets_the_deaths_before_it(bench) -> None:
    job_id = bench.queued().id
    for step in (10, 20, 30, 40):
        claim = bench.claim(job_id)
        bench.checkpoint(claim, step)
        job = bench.do(endings.record_crash, claim, error=DEAD, pause_seconds=0)
        assert (job.state, job.trainer_deaths) == (JobState.QUEUED, 1)


def test_a_checker_of_files_that_dies_goes_back_to_checking(bench) -> None:
    claim = bench.claim(bench.job().id)
    job = bench.do(endings.record_crash, claim, error=DEAD, pause_seconds=0)
    assert job.state == JobState.VALIDATING_FILES
    assert bench.do(endings.finish_prepared, bench.claim(job.id), report={}).state == JobState.QUEUED


def test_checked_files_queue_the_job_with_their_report(bench) -> None:
    job = bench.queued()
    assert (job.state, job.validation) == (JobState.QUEUED, {"rows": 3})
    assert bench.codes(job.id) == ["CREATED", "VALIDATION_COMPLETE", "QUEUED"]
    assert bench.events(job.id)[1].data == {"code": "VALIDATION_COMPLETE", "rows": 3}


def test_a_bad_file_fails_the_job(bench) -> None:
    claim = bench.claim(bench.job().id)
    error = {"code": "invalid_training_file", "message": "line 7: no answer", "param": "training_file"}
    job = bench.do(endings.finish_failed, claim, error=error)
    assert (job.state, job.error) == (JobState.FAILED, error)
    last = bench.events(job.id)[-1]
    assert (last.level, last.data) == ("error", {"code": "FAILED", "error": error})


def test_trouble_after_the_end_does_not_change_the_end(bench) -> None:
    claim = bench.running()
    bench.succeed(claim)
    bench.do(endings.record_cleanup_error, claim, "the scratch folder could not be removed")
    job = bench.get(claim.job_id)
    assert job.state == JobState.SUCCEEDED
    assert job.cleanup_error == "the scratch folder could not be removed"
