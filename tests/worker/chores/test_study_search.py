"""A search from its request to its end: real database, optuna and statistics, and made-up results."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from worker_bench import OWNER, Bench

from heft_engine.evaluation.row_values import pack_correctness
from heft_engine.studies.suggest import Search, Trial, suggest
from store.db.session import transaction
from store.db.study_tables import Study
from store.jobs import endings, leases
from store.storage import files
from store.studies import search_rounds, studies, verdicts
from store.studies.search import Proposal
from store.studies.spec import StudySpec
from worker.chores import compare_studies
from worker.chores.compare_studies import update_studies
from worker.context import ENGINE

BUDGET = 8
SPACE = {"reft.rank": [2, 4, 8], "reft.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}
Quality = Callable[[dict[str, Any]], float]


def quality(params: dict[str, Any]) -> float:
    """Best at rank 4 and a rate of 1e-3."""
    return 0.8 + 0.1 * (params["reft.rank"] == 4) - abs(math.log10(params["reft.learning_rate"]) + 3) / 20


def search_of(bench: Bench, **changes: Any) -> Study:
    fields = {
        "name": "search",
        "model": "tiny",
        "training_file": "sample:passages",
        "validation_file": "sample:passages:validation",
        "test_file": "sample:passages:test",
        "seeds": [1, 2],
        "search": {"space": SPACE, "budget": BUDGET, **changes.pop("search", {})},
    }
    with transaction(bench.context.sessions) as session:
        return studies.create(session, owner_id=OWNER, spec=StudySpec.model_validate(fields | changes))


def read(bench: Bench, study: Study) -> Study:
    with transaction(bench.context.sessions) as session:
        return studies.get(session, owner_id=OWNER, study_id=study.id)


def trials(bench: Bench, study: Study) -> list[Trial]:
    planned = read(bench, study).spec["planned"]
    return [
        Trial(point=arm["trial"]["params"], state=arm["trial"]["state"], value=arm["trial"]["value"])
        for arm in planned
        if "trial" in arm
    ]


def end_all(bench: Bench, study: Study, quality_of: Quality = quality) -> int:
    """Ends every waiting job of the study, as workers would; returns how many there were.

    The accuracy on the test rows is 0.1 lower than on the validation rows, and that of seed 2 is 0.02 higher than that
    of seed 1.
    """
    with transaction(bench.context.sessions) as session:
        waiting = [run for run in studies.runs_of(session, study.id) if run.job.state == "validating_files"]
    arms = {arm["name"]: arm for arm in read(bench, study).spec["planned"]}
    for run in waiting:
        end(bench, run, arms[run.arm], quality_of)
    return len(waiting)


def end(bench: Bench, run: studies.Run, arm: dict[str, Any], quality_of: Quality) -> None:
    with transaction(bench.context.sessions) as session:
        claim = leases.claim(session, job_id=run.job.id, worker_id="w", purpose="prepare")
        assert claim is not None
        endings.finish_prepared(session, claim, report={})
    with transaction(bench.context.sessions) as session:
        claim = leases.claim(session, job_id=run.job.id, worker_id="w", purpose="train")
        assert claim is not None
        value = quality_of(arm["trial"]["params"]) if "trial" in arm else 0.7
        if math.isnan(value):
            endings.finish_failed(session, claim, error={"code": "x", "message": "x", "param": None})
            return
        value += 0.02 * (run.seed - 1.5)
        right = [row < round(200 * (value - 0.1)) for row in range(200)]
        endings.finish_succeeded(
            session,
            claim,
            storage_key=f"jobs/{run.job.id}",
            manifest={},
            task={},
            result={
                "outcomes": {
                    "n": 200,
                    "rows_sha256": "x",
                    "results": [{"stage": "reft", "stage_index": 1, "right": pack_correctness(right)}],
                    "validation": {"n": 100, "metric": "accuracy", "value": value},
                }
            },
        )


def test_a_search_finds_the_planted_best_and_survives_a_restart(bench: Bench, sent: list[Any]) -> None:
    study = search_of(bench, baseline="as it is")
    assert len(trials(bench, study)) == 2
    assert end_all(bench, study) == 6
    update_studies(bench.with_engine(*ENGINE))
    assert [task for task, _ in sent].count("heft.prepare") == 4  # at once, not at the next sweep
    assert end_all(bench, study) == 4
    # The engine's process dies: nothing is lost, nothing is done twice, and the next turn continues.
    before = read(bench, study)
    update_studies(bench.with_engine(sys.executable, "-c", "raise SystemExit(1)"))
    assert (read(bench, study).spec, read(bench, study).event_seq) == (before.spec, before.event_seq)
    while read(bench, study).finished_at is None:
        update_studies(bench.with_engine(*ENGINE))
        end_all(bench, study)

    # The same trials as in a search without interruption.
    interrupted = trials(bench, study)
    straight = interrupted[:2]
    search = Search(space=StudySpec.model_validate(_fields(study)).search.space, budget=BUDGET, seed=1)  # type: ignore[union-attr]
    while len(straight) < BUDGET:
        straight += [
            Trial(point=point, state="complete", value=pytest.approx(quality(point)))
            for point in suggest(search, _plain(straight), 2)
        ]
    assert interrupted == straight

    best = max(interrupted, key=lambda trial: trial.value or 0)
    assert best.point["reft.rank"] == 4
    verdict = read(bench, study).verdict
    assert verdict is not None
    # Only the best trial and the baseline are evaluated on the test rows and compared.
    assert [arm["name"].split(":")[0] for arm in verdict["arms"]] == [
        "as it is",
        f"trial {interrupted.index(best) + 1}",
    ]
    assert verdict["arms"][1]["accuracy"] == pytest.approx(quality(best.point) - 0.1, abs=0.01)
    (comparison,) = verdict["comparisons"]
    assert comparison["b"] == "as it is"
    assert comparison["difference"] > 0


def _fields(study: Study) -> dict[str, Any]:
    return {name: value for name, value in study.spec.items() if name != "planned"}


def _plain(ended: list[Trial]) -> list[Trial]:
    return [Trial(point=trial.point, state="complete", value=quality(trial.point)) for trial in ended]


def test_invalid_trials_are_pruned_and_failed_ones_count(bench: Bench, engine_in_process: None) -> None:
    # A learning rate and a multiplier exclude each other.
    space = {"reft.learning_rate": [1e-4, 1e-3, "auto"], "reft.learning_rate_multiplier": [1.0, 2.0]}
    study = search_of(bench, seeds=[1], search={"space": space, "budget": 4, "parallel": 1})
    end_all(bench, study, lambda params: math.nan)
    while read(bench, study).finished_at is None:
        update_studies(bench.context)
        end_all(bench, study, lambda params: 0.5)
    ended = trials(bench, study)
    assert ended[0].state == "failed"
    states = [trial.state for trial in ended]
    assert states.count("complete") == 3
    for trial in ended:
        is_invalid = (
            trial.point["reft.learning_rate"] != "auto" and trial.point["reft.learning_rate_multiplier"] == 2
        )
        assert (trial.state == "pruned") == is_invalid
    verdict = read(bench, study).verdict
    assert verdict is not None
    assert len(verdict["arms"]) == 1
    assert verdict["comparisons"] == []


def test_a_cancelled_search_tries_nothing_more(bench: Bench, engine_in_process: None) -> None:
    study = search_of(bench, seeds=[1])
    end_all(bench, study)
    with transaction(bench.context.sessions) as session:
        studies.request_cancel(session, owner_id=OWNER, study_id=study.id)
    update_studies(bench.context)
    assert read(bench, study).finished_at is not None
    assert len(trials(bench, study)) == 2
    verdict = read(bench, study).verdict
    assert verdict is not None
    assert len(verdict["arms"]) == 1


def test_a_search_that_only_fails_is_given_up(bench: Bench, engine_in_process: None) -> None:
    study = search_of(bench, seeds=[1])
    while read(bench, study).finished_at is None:
        end_all(bench, study, lambda params: math.nan)
        update_studies(bench.context)
    assert [trial.state for trial in trials(bench, study)] == ["failed"] * 6  # two at a time
    ended = read(bench, study)
    assert search_rounds.summary(ended)["ended_because"] == "the first 6 trials have all failed"
    assert search_rounds.summary(ended)["best"] is None


def test_a_search_whose_file_is_gone_ends_with_what_it_has(bench: Bench, engine_in_process: None) -> None:
    file = bench.uploaded(b"{}")
    study = search_of(bench, seeds=[1], training_file=file)
    end_all(bench, study)
    with transaction(bench.context.sessions) as session:
        files.delete(session, owner_id=OWNER, file_id=file)
    update_studies(bench.context)
    ended = read(bench, study)
    assert ended.finished_at is not None
    assert file in search_rounds.summary(ended)["ended_because"]
    assert ended.verdict is not None
    assert len(ended.verdict["arms"]) == 1
    assert len(trials(bench, study)) == 2


def test_an_outdated_proposal_is_dropped(bench: Bench, engine_in_process: None) -> None:
    study = search_of(bench, seeds=[1], search={"parallel": 3})
    end_all(bench, study)
    with transaction(bench.context.sessions) as session:
        early = studies.runs_of(session, study.id, rows=True)[:1]
        late = Proposal(known_arms=len(read(bench, study).spec["planned"]) + 1, new_arms=())
        assert verdicts.record(session, study.id, early, compare_studies.EMPTY_VERDICT, late) is None
    assert read(bench, study).event_seq == 1
    update_studies(bench.context)
    assert len(trials(bench, study)) == 6
    assert len({str(trial.point) for trial in trials(bench, study)}) == 6


@pytest.mark.parametrize("over", ["cancelled", "closed"])
def test_a_proposal_for_a_search_that_has_ended_is_dropped(
    bench: Bench, engine_in_process: None, over: str
) -> None:
    """The search was cancelled or closed while a worker made its proposal."""
    study = search_of(bench, seeds=[1])
    end_all(bench, study)
    planned = read(bench, study).spec["planned"]
    again = [{**planned[0], "name": "trial 3", "trial": {**planned[0]["trial"], "number": 3}}]
    with transaction(bench.context.sessions) as session:
        runs = studies.runs_of(session, study.id, rows=True)
    with transaction(bench.context.sessions) as session:
        if over == "cancelled":
            studies.request_cancel(session, owner_id=OWNER, study_id=study.id)
        else:
            search_rounds.close(session, studies.get(session, owner_id=OWNER, study_id=study.id), "no file")
    proposal = Proposal(known_arms=len(planned), new_arms=again)
    with transaction(bench.context.sessions) as session:
        assert verdicts.record(session, study.id, runs, compare_studies.EMPTY_VERDICT, proposal) is None
    assert len(read(bench, study).spec["planned"]) == len(planned)
    update_studies(bench.context)
    ended = read(bench, study)
    assert ended.finished_at is not None
    reason = {"cancelled": "it was cancelled", "closed": "no file"}[over]
    assert search_rounds.summary(ended)["ended_because"] == reason


def test_jobs_of_trials_are_told_from_others(bench: Bench) -> None:
    """Only trials are evaluated on the validation rows of text tasks."""
    study = search_of(bench, seeds=[1], baseline="as it is")
    other = bench.queued([])
    with transaction(bench.context.sessions) as session:
        arms = {run.arm: run.job.id for run in studies.runs_of(session, study.id)}
        baseline = arms.pop("as it is")
        assert arms
        assert all(studies.is_trial(session, trial) for trial in arms.values())
        assert not studies.is_trial(session, baseline)
        assert not studies.is_trial(session, other)
