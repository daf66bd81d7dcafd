"""Studies: their jobs, in which order these may train, and how they end."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm.exc import DetachedInstanceError

from store.db.states import JobState
from store.db.study_tables import Study
from store.errors import InvalidRequest, NotFound, WrongState
from store.jobs import endings, jobs, leases, reconcile
from store.ops import diagnosis, job_statistics
from store.studies import studies, verdicts
from store.studies.spec import StudySpec

OWNER = "team"
LORA = {"type": "lora", "lora": {"n_epochs": 3}}
BOOM = {"code": "diverged", "message": "The loss is not a number.", "param": None}


def spec(**changes: Any) -> StudySpec:
    defaults = {
        "name": "layers",
        "model": "smollm2-135m",
        "training_file": "sample:passages",
        "test_file": "sample:passages:test",
        "seeds": [1, 2],
        "grid": {"reft.layers": [1, 2]},
    }
    return StudySpec.model_validate(
        {name: value for name, value in (defaults | changes).items() if value is not None}
    )


def create(bench, *, reuse_enabled: bool = True, **changes: Any) -> Study:
    return bench.do(studies.create, owner_id=OWNER, spec=spec(**changes), reuse_enabled=reuse_enabled)


def runs(bench, study: Study) -> list[studies.Run]:
    return bench.do(studies.runs_of, study.id, rows=True)


def specs(bench, study: Study) -> list[dict[str, Any]]:
    return [bench.get(run.job.id).spec for run in runs(bench, study)]


def prepared(bench, study: Study) -> list[str]:
    """All its jobs queued; their ids in the study's order."""
    ids = [run.job.id for run in runs(bench, study)]
    for job_id in ids:
        bench.do(endings.finish_prepared, bench.claim(job_id), report={"rows": 3})
    return ids


def free(bench) -> list[str]:
    """The jobs that may be trained now, in the order in which they are hinted."""
    return [job_id for job_id, purpose in bench.do(reconcile.sweep, stale_seconds=0) if purpose == "train"]


def status(bench, study: Study) -> str:
    study = bench.do(studies.get, owner_id=OWNER, study_id=study.id)
    return studies.status_of(study, bench.do(studies.states_of, [study.id])[study.id])


def succeed(bench, claim: Any, costs: Any = ()) -> None:
    outcomes = {"n": 4, "rows_sha256": "x", "results": [{"stage": "lora", "stage_index": 0, "right": "8A=="}]}
    bench.do(
        endings.finish_succeeded,
        claim,
        storage_key=f"jobs/{claim.job_id}/{claim.attempt}/bundle",
        manifest={},
        task={"type": "yes_no"},
        result={"outcomes": outcomes, "costs": costs},
    )


VERDICT: dict[str, Any] = {
    "arms": [],
    "comparisons": [{"a": "a", "b": "b", "separable": False, "sentence": "Who knows."}],
}


def test_every_arm_with_every_seed_is_a_job(bench) -> None:
    study = create(bench)
    arms_and_seeds = [
        (run.arm, run.seed, spec["seed"], run.job.state)
        for run, spec in zip(runs(bench, study), specs(bench, study), strict=True)
    ]
    new = JobState.VALIDATING_FILES
    assert arms_and_seeds == [
        ("reft.layers=1", 1, 1, new),
        ("reft.layers=2", 1, 1, new),
        ("reft.layers=1", 2, 2, new),
        ("reft.layers=2", 2, 2, new),
    ]
    layers = [spec["method"]["heft"]["reft"]["layers"] for spec in specs(bench, study)]
    assert layers == [[1], [2], [1], [2]]
    mine = bench.do(jobs.list_page, owner_id=OWNER, metadata={"study": study.id, "arm": "reft.layers=2"})
    assert [job.spec["seed"] for job in mine.items] == [2, 1]
    assert status(bench, study) == "queued"


def test_another_owners_study_is_not_found(bench) -> None:
    study = create(bench)
    with pytest.raises(NotFound):
        bench.do(studies.get, owner_id="other", study_id=study.id)
    assert bench.do(studies.list_page, owner_id="other").items == []
    assert [listed.id for listed in bench.do(studies.list_page, owner_id=OWNER).items] == [study.id]


def test_nothing_is_queued_when_an_arm_can_not_be(bench) -> None:
    arms = [{"name": "fine"}, {"name": "bad", "set": {"reft.rank": 0}}]
    with pytest.raises(InvalidRequest) as refused:
        create(bench, grid=None, arms=arms)
    assert refused.value.param == "arms[1].set.reft.rank"
    assert bench.sql("SELECT 1 FROM jobs") == []
    assert bench.sql("SELECT 1 FROM studies") == []


# -- who may train ----------------------------------------------------------------------------------------------------


def test_jobs_that_share_stage_1_wait_for_the_first_to_pass_it(bench) -> None:
    study = create(bench, grid={"reft.layers": [1, 2, 3]})
    first, second, third, other_seed, *_ = prepared(bench, study)
    assert free(bench) == [first, other_seed]
    assert bench.do(leases.claim, job_id=second, worker_id="w", purpose="train") is None
    assert bench.do(leases.longest_waiting, purpose="train") == first
    claim = bench.claim(first)
    assert free(bench) == [other_seed]
    bench.do(leases.record_stage_passed, claim, stages=1)
    assert free(bench) == [second, third, other_seed]
    assert bench.claim(third).job_id == third


def test_should_the_first_fail_the_next_one_trains_the_stage(bench) -> None:
    first, second, third = prepared(bench, create(bench, grid={"reft.layers": [1, 2, 3]}, seeds=[1]))
    bench.do(endings.finish_failed, bench.claim(first), error=BOOM)
    assert free(bench) == [second]
    claim = bench.claim(second)
    assert free(bench) == []
    bench.expire(second)
    assert free(bench) == [second]  # its worker was lost: it goes on elsewhere, and the third waits on
    succeed(bench, bench.claim(second))
    assert free(bench) == [third]
    assert claim.attempt == 2


def test_a_paused_job_holds_nobody_back(bench) -> None:
    first, second = prepared(bench, create(bench, seeds=[1]))
    bench.do(jobs.request_pause, owner_id=OWNER, job_id=first)
    assert free(bench) == [second]
    bench.claim(second)
    bench.do(jobs.resume, owner_id=OWNER, job_id=first)
    assert free(bench) == [first]  # it is before the other, which by now trains the stage as well


def test_what_passed_before_a_failure_is_there(bench) -> None:
    first, second, third = prepared(bench, create(bench, grid={"reft.layers": [1, 2, 3]}, seeds=[1]))
    claim = bench.claim(first)
    bench.do(leases.record_stage_passed, claim, stages=1)
    bench.do(endings.finish_failed, claim, error=BOOM)
    assert free(bench) == [second, third]


def test_a_longer_shared_beginning_is_waited_for_too(bench) -> None:
    stages = [{"type": "lora"}, {"type": "reft"}]
    recipes = [stages, [*stages, {"type": "lora"}], [stages[0], {"type": "reft", "rank": 2}]]
    arms = [
        {"name": str(i), "method": {"type": "recipe", "recipe": {"stages": recipe}}}
        for i, recipe in enumerate(recipes)
    ]
    short, long, other = prepared(bench, create(bench, grid=None, arms=arms, seeds=[1]))
    claim = bench.claim(short)
    assert free(bench) == []
    bench.do(leases.record_stage_passed, claim, stages=1)
    assert free(bench) == [other]
    bench.do(leases.record_stage_passed, claim, stages=2)
    assert free(bench) == [long, other]


def test_jobs_that_share_nothing_do_not_wait(bench) -> None:
    arms = [{"name": "lora", "method": LORA}, {"name": "reft", "method": {"type": "reft"}}]
    assert len(free_of(bench, create(bench, grid=None, arms=arms, seeds=[1]))) == 2
    assert len(free_of(bench, create(bench, reuse=False, seeds=[1]))) == 2
    assert len(free_of(bench, create(bench, reuse_enabled=False, seeds=[1]))) == 2
    assert len(free_of(bench, create(bench, grid={"lora.rank": [2, 4]}, seeds=[1]))) == 2


def free_of(bench, study: Study) -> list[str]:
    ids = prepared(bench, study)
    return [job_id for job_id in free(bench) if job_id in ids]


def test_jobs_of_other_studies_and_owners_do_not_wait_for_each_other(bench) -> None:
    studies_of_owner = [create(bench, seeds=[1]) for _ in range(2)]
    first, second = (prepared(bench, study)[0] for study in studies_of_owner)
    assert free(bench) == [first, second]


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_failed_arm_does_not_fail_the_study(bench) -> None:
    study = create(bench, seeds=[1])
    first_job, second_job = prepared(bench, study)
    bench.do(endings.finish_failed, bench.claim(first_job), error=BOOM)
    assert status(bench, study) == "running"
    succeed(bench, bench.claim(second_job))
    assert status(bench, study) == "running"  # until it is judged
    news = bench.do(verdicts.next_study)
    assert news.id == study.id
    study_runs = runs(bench, study)
    compare_input = verdicts.compare_input(news, study_runs)
    assert [(arm["name"], len(arm["runs"])) for arm in compare_input["arms"]] == [
        ("reft.layers=1", 0),
        ("reft.layers=2", 1),
    ]
    assert compare_input["arms"][1]["runs"][0] == {"seed": 1, "n": 4, "rows_sha256": "x", "right": "8A=="}
    study_runs[1].outcome.outcomes["results"][-1] = {"stage": "lora", "stage_index": 0, "values": "AAAA"}
    graded = verdicts.compare_input(news, study_runs)["arms"][1]["runs"][0]
    assert graded == {"seed": 1, "n": 4, "rows_sha256": "x", "values": "AAAA"}
    assert bench.do(verdicts.record, study.id, study_runs, VERDICT) is not None
    assert status(bench, study) == "succeeded"
    assert bench.do(verdicts.next_study) is None
    page = bench.do(studies.list_events, owner_id=OWNER, study_id=study.id)
    reported = [(event.data["code"], event.level) for event in reversed(page.items)]
    assert reported == [
        ("CREATED", "info"),
        ("JOB_ENDED", "error"),
        ("JOB_ENDED", "info"),
        ("COMPARISON", "info"),
        ("SUCCEEDED", "info"),
    ]


def test_a_study_of_failures_has_failed(bench) -> None:
    study = create(bench, seeds=[1])
    for job_id in prepared(bench, study):
        bench.do(endings.finish_failed, bench.claim(job_id), error=BOOM)
    bench.do(verdicts.record, study.id, runs(bench, study), VERDICT)
    assert status(bench, study) == "failed"


def test_a_verdict_that_others_have_made_or_overtaken_is_dropped(bench) -> None:
    study = create(bench, seeds=[1, 2])
    first, second = prepared(bench, study)[:2]
    succeed(bench, bench.claim(first))
    early = runs(bench, study)
    succeed(bench, bench.claim(second))
    late = runs(bench, study)
    assert bench.do(verdicts.record, study.id, late, VERDICT) is not None
    for seen in (early, late):
        assert bench.do(verdicts.record, study.id, seen, {"arms": [], "comparisons": []}) is None
    study = bench.do(studies.get, owner_id=OWNER, study_id=study.id)
    assert study.verdict == VERDICT
    assert study.finished_at is None


def test_a_study_that_can_not_be_judged_does_not_stand_before_others(bench) -> None:
    first, second = (create(bench, seeds=[1]) for _ in range(2))
    for study in (first, second):
        succeed(bench, bench.claim(prepared(bench, study)[0]))
    assert bench.do(verdicts.next_study).id == first.id
    assert bench.do(verdicts.next_study, exclude={first.id}).id == second.id
    assert bench.do(verdicts.next_study, exclude={first.id, second.id}) is None


def test_a_study_is_judged_while_it_goes_on(bench) -> None:
    study = create(bench, seeds=[1])
    first, _ = prepared(bench, study)
    assert bench.do(verdicts.next_study) is None
    succeed(bench, bench.claim(first))
    assert bench.do(verdicts.record, study.id, runs(bench, study), VERDICT) is not None
    assert bench.do(verdicts.next_study) is None
    assert status(bench, study) == "running"


def test_cancelling_a_study_cancels_its_jobs(bench) -> None:
    study = create(bench, seeds=[1])
    first, second = prepared(bench, study)
    succeed(bench, bench.claim(first))
    bench.do(studies.request_cancel, owner_id=OWNER, study_id=study.id)
    bench.do(studies.request_cancel, owner_id=OWNER, study_id=study.id)
    assert (bench.get(first).state, bench.get(second).state) == (JobState.SUCCEEDED, JobState.CANCELLED)
    bench.do(verdicts.record, study.id, runs(bench, study), VERDICT)
    assert status(bench, study) == "cancelled"
    with pytest.raises(WrongState):
        bench.do(studies.request_cancel, owner_id=OWNER, study_id=study.id)
    with pytest.raises(NotFound):
        bench.do(studies.request_cancel, owner_id="other", study_id=study.id)


def test_a_study_whose_jobs_have_all_ended_is_not_cancelled_any_more(bench) -> None:
    study = create(bench, seeds=[1])
    for job_id in prepared(bench, study):
        succeed(bench, bench.claim(job_id))
    with pytest.raises(WrongState, match="on its way"):
        bench.do(studies.request_cancel, owner_id=OWNER, study_id=study.id)
    bench.do(verdicts.record, study.id, runs(bench, study), VERDICT)
    assert status(bench, study) == "succeeded"


def test_who_waits_for_a_shared_stage_is_not_late(bench) -> None:
    study = create(bench, seeds=[1])
    first, _ = prepared(bench, study)
    bench.claim(first)
    assert bench.do(job_statistics.jobs).waiting_seconds["queued"] == 0
    [queue] = [queue for queue in bench.do(diagnosis.queues) if queue.purpose == "train"]
    assert (queue.length, queue.claimed) == (0, 1)


def test_a_study_whose_jobs_are_all_put_aside_is_paused(bench) -> None:
    study = create(bench, seeds=[1])
    for job_id in prepared(bench, study):
        bench.do(jobs.request_pause, owner_id=OWNER, job_id=job_id)
    assert status(bench, study) == "paused"


# -- arms of equal compute -----------------------------------------------------------------------------------------

COSTS = [
    {"stage": "lora", "stage_index": 0, "epochs": 3.0, "flops": 3_000, "flops_once": 0},
    {"stage": "reft", "stage_index": 1, "epochs": 3.0, "flops": 430, "flops_once": 400},
]


def equal_compute(bench) -> Study:
    return create(bench, grid=None, preset="equal_compute")


def end_reference(bench, study: Study, **outcome: Any) -> None:
    succeed(bench, bench.claim(prepared(bench, study)[0]), **outcome)
    bench.do(verdicts.record, study.id, runs(bench, study), VERDICT)


def test_arms_of_equal_arithmetic_follow_the_first_run(bench) -> None:
    study = equal_compute(bench)
    assert [(run.arm, run.seed) for run in runs(bench, study)] == [("HEFT 3+3", 1), ("HEFT 3+3", 2)]
    end_reference(bench, study, costs=COSTS)
    new = runs(bench, study)[2:]
    assert [(run.arm, run.seed) for run in new] == [
        ("LoRA alone", 1), ("ReFT alone", 1), ("LoRA alone", 2), ("ReFT alone", 2),
    ]  # fmt: skip
    lora, reft = (spec["method"] for spec in specs(bench, study)[2:4])
    assert lora["lora"]["n_epochs"] == 3  # 3,430 of 1,000 each
    assert reft["reft"]["n_epochs"] == 303  # 3,430 less 400, of 10 each
    study = bench.do(studies.get, owner_id=OWNER, study_id=study.id)
    assert [arm["like"] for arm in study.spec["planned"]] == [None] * 3
    assert study.spec["planned"][2]["method"]["reft"]["n_epochs"] == 303
    assert study.finished_at is None
    bench.do(verdicts.record, study.id, runs(bench, study), VERDICT)
    assert len(runs(bench, study)) == 6  # made once


@pytest.mark.parametrize("seen", [1, 2])
def test_who_read_the_runs_before_others_followed_up_does_not_end_the_study(bench, seen: int) -> None:
    study = equal_compute(bench)
    first, second = prepared(bench, study)
    succeed(bench, bench.claim(first), costs=COSTS)
    early = runs(bench, study)
    if seen == 2:
        succeed(bench, bench.claim(second), costs=COSTS)
    late = runs(bench, study)
    new_job_ids = bench.do(verdicts.record, study.id, early, VERDICT)
    assert new_job_ids == [run.job.id for run in runs(bench, study)[2:]]
    assert bench.do(verdicts.record, study.id, late, VERDICT) == ([] if seen == 2 else None)
    assert bench.do(studies.get, owner_id=OWNER, study_id=study.id).finished_at is None
    assert len(runs(bench, study)) == 6


def test_without_a_run_to_follow_the_study_ends(bench) -> None:
    study = equal_compute(bench)
    for job_id in prepared(bench, study):
        bench.do(endings.finish_failed, bench.claim(job_id), error=BOOM)
    bench.do(verdicts.record, study.id, runs(bench, study), VERDICT)
    assert status(bench, study) == "failed"
    page = bench.do(studies.list_events, owner_id=OWNER, study_id=study.id)
    assert "NOT_MATCHED" in [event.data["code"] for event in page.items]


def test_a_cancelled_study_makes_no_more_jobs(bench) -> None:
    study = equal_compute(bench)
    first, _ = prepared(bench, study)
    succeed(bench, bench.claim(first), costs=COSTS)
    bench.do(studies.request_cancel, owner_id=OWNER, study_id=study.id)
    bench.do(verdicts.record, study.id, runs(bench, study), VERDICT)
    assert len(runs(bench, study)) == 2
    assert status(bench, study) == "cancelled"


# -- several tasks ----------------------------------------------------------------------------------------------------


def test_runs_are_judged_by_method_and_task(bench) -> None:
    files = {"training_file": "sample:passages", "test_file": "sample:passages:test"}
    tasks = [{"name": name, **files} for name in ("boolq", "sst2")]
    empty = {"grid": None, "training_file": None, "test_file": None}
    study = create(bench, **empty, preset="cross_task", tasks=tasks, baseline="HEFT 3+3", seeds=[1])
    study_runs = runs(bench, study)
    compare_input = verdicts.compare_input(study, study_runs)
    assert compare_input["baseline"] == "HEFT 3+3"
    assert [(arm["method"], arm["task"]) for arm in compare_input["arms"]][2:4] == [
        ("HEFT 3+3", "boolq"), ("LoRA alone 6", "sst2"),
    ]  # fmt: skip


def test_files_of_tasks_are_refused_by_the_names_that_the_request_has_for_them(bench) -> None:
    good = {"name": "boolq", "training_file": bench.file(), "test_file": bench.file()}
    gone = {"name": "sst2", "training_file": bench.file(), "test_file": "file-gone"}
    with pytest.raises(InvalidRequest) as refused:
        create(bench, grid=None, training_file=None, test_file=None, preset="cross_task", tasks=[good, gone])
    assert refused.value.param == "tasks[1].test_file"
    assert bench.sql("SELECT 1 FROM jobs") == []


def test_what_is_not_shown_is_not_read(bench) -> None:
    study = create(bench, seeds=[1])
    succeed(bench, bench.claim(prepared(bench, study)[0]), costs=COSTS)
    run = bench.do(studies.runs_of, study.id)[0]
    assert run.outcome.costs == COSTS
    for read in (lambda: run.outcome.outcomes, lambda: run.job.spec):
        with pytest.raises((InvalidRequestError, DetachedInstanceError)):
            read()
