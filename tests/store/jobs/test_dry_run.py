"""Dry runs: estimates from checked rows, a machine and earlier jobs, and where they are listed."""

from __future__ import annotations

from typing import Any

import pytest

from store.db.states import JobState
from store.db.study_tables import Outcome
from store.jobs import dry_run, endings, jobs
from store.ops import workers

MACHINE = {"gpus": 1, "gpu_bytes": 24 * 10**9, "host_bytes": 64 * 10**9, "auto_dtype": "bfloat16"}
TRAINING = {"rows": 100, "examples": 120, "truncated": 3, "longest": 90, "tokens": 6_000}
REPORT = {"files": {"training_file": TRAINING}, "faults": []}


def planned(stage: str, **changes: Any) -> dict[str, Any]:
    return {"type": stage, "fits": True, "placement": "one GPU", "flops": 6_000, **changes}


@pytest.fixture
def spec(bench):
    lora, reft = {"n_epochs": 2, "batch_size": 16}, {"n_epochs": 3, "batch_size": 32}
    method = {"type": "heft", "heft": {"lora": lora, "reft": reft}}
    return type(bench.spec).model_validate({**bench.spec.model_dump(), "method": method, "dry_run": True})


def measured(bench, **costs: tuple[int, float]) -> None:
    """A job that has succeeded with these operations and seconds of its stages."""
    job = bench.succeed(bench.running())
    values = [
        {"stage": stage, "flops": flops, "seconds": seconds} for stage, (flops, seconds) in costs.items()
    ]
    with bench.factory.begin() as session:
        session.query(Outcome).filter_by(job_id=job.id).update({"costs": values})


def test_rows_and_steps_are_counted_from_the_checked_file(bench, spec) -> None:
    estimate = bench.do(dry_run.estimate, spec, REPORT, None, None)
    assert (estimate["rows"], estimate["truncated_rows"], estimate["longest_example_tokens"]) == (100, 3, 90)
    assert estimate["trained_tokens"] == 5 * 6_000
    assert estimate["steps"] == 2 * 8 + 3 * 4
    assert (estimate["fits"], estimate["stages"], estimate["seconds"], estimate["machine"]) == (None,) * 4


def test_seconds_come_from_the_rates_of_earlier_jobs_by_stage(bench, spec) -> None:
    measured(bench, lora=(1_000, 1.0), reft=(300, 3.0))
    measured(bench, lora=(3_000, 1.0))
    estimate = bench.do(dry_run.estimate, spec, REPORT, [planned("lora"), planned("reft")], MACHINE)
    assert [stage["seconds"] for stage in estimate["stages"]] == [3.0, 60.0]
    assert (estimate["seconds"], estimate["measured_jobs"], estimate["fits"]) == (63.0, 2, True)


def test_jobs_on_the_same_base_are_preferred(bench, spec) -> None:
    measured(bench, lora=(1_000, 1.0), reft=(1_000, 1.0))
    other = spec.model_copy(update={"model": "another"})
    assert bench.do(dry_run.estimate, other, REPORT, [planned("lora")], MACHINE)["seconds"] == 6.0
    unmeasured = bench.do(dry_run.estimate, other, REPORT, [planned("dpo")], MACHINE)
    assert unmeasured["seconds"] is None


def test_stages_that_were_reused_are_not_measured_again(bench, spec) -> None:
    measured(bench, lora=(1_000, 1.0))
    job = bench.succeed(bench.running())
    copies = [{"stage": "lora", "flops": 1_000, "seconds": 1_000.0, "reused": True}]
    with bench.factory.begin() as session:
        session.query(Outcome).filter_by(job_id=job.id).update({"costs": copies})
    estimate = bench.do(dry_run.estimate, spec, REPORT, [planned("lora")], MACHINE)
    assert (estimate["seconds"], estimate["measured_jobs"]) == (6.0, 1)


def test_a_stage_that_does_not_fit_has_no_time(bench, spec) -> None:
    measured(bench, lora=(1_000, 1.0), reft=(1_000, 1.0))
    unfit = planned("reft", fits=False, flops=None, error="take a smaller model")
    estimate = bench.do(dry_run.estimate, spec, REPORT, [planned("lora"), unfit], MACHINE)
    assert (estimate["fits"], estimate["seconds"]) == (False, None)
    assert estimate["stages"][1]["error"] == "take a smaller model"


def test_the_machine_is_a_running_training_workers(bench) -> None:
    assert bench.do(workers.training_machine) is None
    bench.do(workers.register, worker_id="inference-1", role="inference", info={"machine": {"gpus": 8}})
    bench.do(workers.register, worker_id="train-1", role="train", info={})
    assert bench.do(workers.training_machine) is None
    bench.do(workers.update_info, worker_id="train-1", changes={"machine": MACHINE})
    assert bench.do(workers.training_machine) == MACHINE


def test_a_dry_run_ends_without_a_model_and_is_listed_apart(bench, spec) -> None:
    job = bench.do(jobs.create, owner_id="team", spec=spec)
    real = bench.job()
    ended = bench.do(endings.finish_dry_run, bench.claim(job.id), report=REPORT, estimate={"steps": 28})
    assert (ended.state, ended.fine_tuned_model) == (JobState.SUCCEEDED, None)
    assert ended.validation == {**REPORT, "estimate": {"steps": 28}}
    assert bench.codes(job.id) == ["CREATED", "SUCCEEDED"]
    listed = {
        wanted: bench.do(jobs.list_page, owner_id="team", dry_run=wanted).items for wanted in (False, True)
    }
    assert [item.id for item in listed[False]] == [real.id]
    assert [item.id for item in listed[True]] == [job.id]
