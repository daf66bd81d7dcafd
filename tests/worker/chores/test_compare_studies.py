"""A worker compares the arms of studies, with the real statistics over results of fake jobs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_bench import OWNER, Act, Bench, eventually

from heft_engine.evaluation.row_values import pack_correctness
from store.db.session import transaction
from store.db.states import JobState
from store.db.study_tables import Outcome, Study
from store.jobs import endings, leases
from store.jobs.spec import Method
from store.studies import studies, verdicts
from store.studies.spec import StudySpec
from worker.chores.compare_studies import update_studies
from worker.context import ENGINE
from worker.jobs.prepare import prepare_job


def study_of(bench: Bench, acts: list[Act], **changes: Any) -> Study:
    """Creates a study whose queued jobs the fake engine runs."""
    rows = bench.uploaded("".join(json.dumps(act) + "\n" for act in acts).encode())
    fields = {
        "name": "ranks",
        "model": "tiny",
        "training_file": rows,
        "test_file": rows,
        "seeds": [1, 2],
        "arms": [{"name": "a"}, {"name": "b", "set": {"reft.rank": 2}}],
    }
    with transaction(bench.context.sessions) as session:
        study = studies.create(session, owner_id=OWNER, spec=StudySpec.model_validate(fields | changes))
    for run in runs(bench, study):
        with transaction(bench.context.sessions) as session:
            claim = leases.claim(session, job_id=run.job.id, worker_id="prepare", purpose="prepare")
            assert claim is not None
            endings.finish_prepared(session, claim, report={"rows": 1})
    return study


def runs(bench: Bench, study: Study) -> list[studies.Run]:
    with transaction(bench.context.sessions) as session:
        return studies.runs_of(session, study.id)


def read(bench: Bench, study: Study) -> Study:
    with transaction(bench.context.sessions) as session:
        return studies.get(session, owner_id=OWNER, study_id=study.id)


def left(*right: int) -> Act:
    """Returns an action that reports the first `n` of 40 rows as correct, one number for each seed."""
    return {
        "do": "leave",
        "right": [pack_correctness([row < n for row in range(40)]) for n in right],
        "n": 40,
    }


def test_a_job_leaves_its_rows_and_costs(bench: Bench) -> None:
    cost = {"stage": "lora", "stage_index": 0, "flops": 5, "seconds": 1.0, "trained_parameters": 2}
    job_id = bench.queued([{"do": "metrics", "step": 4}, {**left(30), "costs": [cost]}])
    assert bench.run(job_id).state == JobState.SUCCEEDED
    with transaction(bench.context.sessions) as session:
        outcome = session.get_one(Outcome, job_id)
    assert outcome.costs == [cost]
    assert outcome.outcomes is not None
    assert outcome.outcomes["n"] == 40


def test_passing_a_stage_lets_the_others_of_a_study_start(bench: Bench) -> None:
    study = study_of(
        bench, [{"do": "checkpoint", "step": 4, "kind": "stage", "key": "a" * 64}, {"do": "wait"}], seeds=[1]
    )
    first, second = (run.job.id for run in runs(bench, study))
    assert bench.run(second).state == JobState.QUEUED  # it waits for the shared stage
    assert bench.outcomes(second) == []
    first_attempt = bench.start(first)
    eventually(lambda: bench.job(first).stages_passed == 1)
    second_attempt = bench.start(second)
    bench.saw(second, "CHECKPOINT_SAVED")
    assert bench.job(first).state == JobState.RUNNING
    bench.context.stopping.set()
    first_attempt.result(60)
    second_attempt.result(60)


def test_a_study_is_compared_by_the_real_statistics(bench: Bench) -> None:
    study = study_of(bench, [{"do": "metrics", "step": 4}, left(30, 31)])
    for run in runs(bench, study):
        assert bench.run(run.job.id).state == JobState.SUCCEEDED
    update_studies(bench.with_engine(*ENGINE))
    compared = read(bench, study)
    assert compared.finished_at is not None
    assert compared.verdict is not None
    assert [arm["accuracy"] for arm in compared.verdict["arms"]] == [(30 + 31) / 80] * 2
    sentence = compared.verdict["comparisons"][0]["sentence"]
    assert sentence.startswith("a and b differ by less than 0.1 points")


def test_a_study_that_could_not_be_compared_is_tried_again(bench: Bench) -> None:
    study = study_of(bench, [left(30)], seeds=[1])
    assert bench.run(runs(bench, study)[0].job.id).state == JobState.SUCCEEDED
    update_studies(bench.with_engine(sys.executable, "-c", "raise SystemExit(1)"))
    assert read(bench, study).verdict is None
    update_studies(bench.with_engine(*ENGINE))
    assert read(bench, study).verdict is not None
    assert read(bench, study).finished_at is None


def test_a_study_that_raises_an_error_does_not_hold_up_the_others(
    bench: Bench, engine_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = (study_of(bench, [left(30)], seeds=[1]) for _ in range(2))
    for study in (broken, whole):
        assert bench.run(runs(bench, study)[0].job.id).state == JobState.SUCCEEDED
    record = verdicts.record

    def failing(session: Any, study_id: str, *arguments: Any, **options: Any) -> Any:
        if study_id == broken.id:
            raise KeyError("of what was written down long ago")
        return record(session, study_id, *arguments, **options)

    monkeypatch.setattr(verdicts, "record", failing)
    update_studies(bench.context)
    assert (read(bench, broken).verdict is None, read(bench, whole).verdict is None) == (True, False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_with_the_real_engine_trains_what_its_arms_share_once(
    bench: Bench, tiny_llama_dir: Path
) -> None:
    real = replace(bench.with_settings(model_dir=tiny_llama_dir.parent), engine_command=ENGINE)
    rows = [{"question": f"is {n} even", "passage": f"It is {n}.", "answer": n % 2 == 0} for n in range(48)]
    file = bench.uploaded("".join(json.dumps(row) + "\n" for row in rows).encode())
    epochs = {"n_epochs": 2, "batch_size": 8}
    spec = StudySpec(
        name="ranks",
        model="llama",
        training_file=file,
        test_file=file,
        seeds=[1],
        method=Method.model_validate({"type": "heft", "heft": {"lora": epochs, "reft": epochs}}),
        grid={"reft.rank": [1, 2, 4]},
    )
    with transaction(bench.context.sessions) as session:
        study = studies.create(session, owner_id=OWNER, spec=spec)
    ids = [run.job.id for run in runs(bench, study)]
    for job_id in ids:
        prepare_job(real, job_id)
    for job_id in ids:
        assert bench.run(job_id, real).state == JobState.SUCCEEDED
    assert ["STAGE_REUSED" in bench.codes(job_id) for job_id in ids] == [False, True, True]
    update_studies(real)
    compared = read(bench, study)
    assert compared.verdict is not None
    assert [len(arm["per_seed"]) for arm in compared.verdict["arms"]] == [1, 1, 1]
    sentences = [comparison["sentence"] for comparison in compared.verdict["comparisons"]]
    assert len(sentences) == 3
    assert all(text.startswith("With one common seed only models can be compared") for text in sentences)
    costs = [run.outcome.costs for run in runs(bench, study) if run.outcome is not None]
    assert [cost[0].get("reused", False) for cost in costs] == [False, True, True]
    assert len({cost[0]["flops"] for cost in costs}) == 1
