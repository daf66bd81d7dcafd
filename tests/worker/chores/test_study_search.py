"""A search from its request to its end: real database, real optuna, real statistics, results that are made up."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from worker_bench import OWNER, Bench

from heft_engine.commands import compare as compare_command
from heft_engine.commands import suggest as suggest_command
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
    given = {
        "name": "search",
        "model": "tiny",
        "training_file": "sample:passages",
        "validation_file": "sample:passages:validation",
        "test_file": "sample:passages:test",
        "seeds": [1, 2],
        "search": {"space": SPACE, "budget": BUDGET, **changes.pop("search", {})},
    }
    with transaction(bench.context.sessions) as session:
        return studies.create(session, owner_id=OWNER, spec=StudySpec.model_validate(given | changes))


def read(bench: Bench, study: Study) -> Study:
    with transaction(bench.context.sessions) as session:
        return studies.get(session, owner_id=OWNER, study_id=study.id)


def trials(bench: Bench, study: Study) -> list[Trial]:
    planned = read(bench, study).spec["planned"]
    found = [arm["trial"] for arm in planned if "trial" in arm]
    return [Trial(point=one["params"], state=one["state"], value=one["value"]) for one in found]


def end_all(bench: Bench, study: Study, judged_by: Quality = quality) -> int:
    """Play the workers: every job of the study that waits ends; how many there were. The test rows are worth as much
    as 0.1 less than the validation rows, and seed 2 as much as 0.02 more than seed 1."""
    with transaction(bench.context.sessions) as session:
        waiting = [run for run in studies.runs_of(session, study.id) if run.job.state == "validating_files"]
    arms = {arm["name"]: arm for arm in read(bench, study).spec["planned"]}
    for run in waiting:
        end(bench, run, arms[run.arm], judged_by)
    return len(waiting)


def end(bench: Bench, run: studies.Run, arm: dict[str, Any], judged_by: Quality) -> None:
    with transaction(bench.context.sessions) as session:
        claim = leases.claim(session, job_id=run.job.id, worker_id="w", purpose="prepare")
        assert claim is not None
        endings.finish_prepared(session, claim, report={})
    with transaction(bench.context.sessions) as session:
        claim = leases.claim(session, job_id=run.job.id, worker_id="w", purpose="train")
        assert claim is not None
        value = judged_by(arm["trial"]["params"]) if "trial" in arm else 0.7
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
            outcomes={
                "n": 200,
                "rows_sha256": "x",
                "results": [{"stage": "reft", "stage_index": 1, "right": pack_correctness(right)}],
                "validation": {"n": 100, "metric": "accuracy", "value": value},
            },
        )


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine answers in this process: its children take half a second to start."""

    def query(_context: Any, command_name: str, question: dict[str, Any]) -> dict[str, Any]:
        command: Any = {"suggest": suggest_command, "compare": compare_command}[command_name]
        answer: dict[str, Any] = command.answer(command.Question.model_validate(question))
        return answer

    monkeypatch.setattr(compare_studies, "query_engine", query)


def test_a_search_finds_the_planted_best_and_survives_a_restart(bench: Bench, sent: list[Any]) -> None:
    study = search_of(bench, baseline="as it is")
    assert len(trials(bench, study)) == 2
    assert end_all(bench, study) == 6
    update_studies(bench.with_engine(*ENGINE))
    assert [task for task, _ in sent].count("heft.prepare") == 4  # at once, not at the next sweep
    assert end_all(bench, study) == 4
    # Its worker dies while it is asked: nothing is lost, nothing made twice, and another goes on from what there is.
    before = read(bench, study)
    update_studies(bench.with_engine(sys.executable, "-c", "raise SystemExit(1)"))
    assert (read(bench, study).spec, read(bench, study).event_seq) == (before.spec, before.event_seq)
    while read(bench, study).finished_at is None:
        update_studies(bench.with_engine(*ENGINE))
        end_all(bench, study)

    # The same as one that nothing has interrupted.
    found = trials(bench, study)
    straight = found[:2]
    search = Search(space=StudySpec.model_validate(_asked(study)).search.space, budget=BUDGET, seed=1)  # type: ignore[union-attr]
    while len(straight) < BUDGET:
        straight += [
            Trial(point=point, state="complete", value=pytest.approx(quality(point)))
            for point in suggest(search, _plain(straight), 2)
        ]
    assert found == straight

    best = max(found, key=lambda trial: trial.value or 0)
    assert best.point["reft.rank"] == 4
    verdict = read(bench, study).verdict
    assert verdict is not None
    # The test rows of the best and the baseline alone are looked at, and one comparison is made.
    assert [arm["name"].split(":")[0] for arm in verdict["arms"]] == [
        "as it is",
        f"trial {found.index(best) + 1}",
    ]
    assert verdict["arms"][1]["accuracy"] == pytest.approx(quality(best.point) - 0.1, abs=0.01)
    (comparison,) = verdict["comparisons"]
    assert comparison["b"] == "as it is"
    assert comparison["difference"] > 0


def _asked(study: Study) -> dict[str, Any]:
    return {name: value for name, value in study.spec.items() if name != "planned"}


def _plain(found: list[Trial]) -> list[Trial]:
    return [Trial(point=one.point, state="complete", value=quality(one.point)) for one in found]


def test_trials_that_can_not_be_are_left_out_and_those_that_fail_count(bench: Bench, at_hand: None) -> None:
    # A number for the rate and a multiplier can't both be.
    space = {"reft.learning_rate": [1e-4, 1e-3, "auto"], "reft.learning_rate_multiplier": [1.0, 2.0]}
    study = search_of(bench, seeds=[1], search={"space": space, "budget": 4, "parallel": 1})
    end_all(bench, study, lambda params: math.nan)
    while read(bench, study).finished_at is None:
        update_studies(bench.context)
        end_all(bench, study, lambda params: 0.5)
    found = trials(bench, study)
    assert found[0].state == "failed"
    states = [trial.state for trial in found]
    assert states.count("complete") == 3
    for trial in found:
        numbers = (
            trial.point["reft.learning_rate"] != "auto" and trial.point["reft.learning_rate_multiplier"] == 2
        )
        assert (trial.state == "pruned") == numbers
    verdict = read(bench, study).verdict
    assert verdict is not None
    assert len(verdict["arms"]) == 1
    assert verdict["comparisons"] == []


def test_a_cancelled_search_tries_nothing_more(bench: Bench, at_hand: None) -> None:
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


def test_a_search_that_only_fails_is_given_up(bench: Bench, at_hand: None) -> None:
    study = search_of(bench, seeds=[1])
    while read(bench, study).finished_at is None:
        end_all(bench, study, lambda params: math.nan)
        update_studies(bench.context)
    assert [trial.state for trial in trials(bench, study)] == ["failed"] * 6  # two at a time
    found = read(bench, study)
    assert search_rounds.summary(found)["ended_because"] == "the first 6 trials have all failed"
    assert search_rounds.summary(found)["best"] is None


def test_a_search_whose_file_is_gone_ends_with_what_it_has(bench: Bench, at_hand: None) -> None:
    file = bench.uploaded(b"{}")
    study = search_of(bench, seeds=[1], training_file=file)
    end_all(bench, study)
    with transaction(bench.context.sessions) as session:
        files.delete(session, owner_id=OWNER, file_id=file)
    update_studies(bench.context)
    found = read(bench, study)
    assert found.finished_at is not None
    assert file in search_rounds.summary(found)["ended_because"]
    assert found.verdict is not None
    assert len(found.verdict["arms"]) == 1
    assert len(trials(bench, study)) == 2


def test_what_was_proposed_before_others_went_on_is_dropped(bench: Bench, at_hand: None) -> None:
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
def test_what_was_proposed_before_the_search_was_over_is_dropped(
    bench: Bench, at_hand: None, over: str
) -> None:
    """Another worker, or the user, was quicker than this one's look."""
    study = search_of(bench, seeds=[1])
    end_all(bench, study)
    planned = read(bench, study).spec["planned"]
    again = [{**planned[0], "name": "trial 3", "trial": {**planned[0]["trial"], "number": 3}}]
    with transaction(bench.context.sessions) as session:
        looked_at = studies.runs_of(session, study.id, rows=True)
    with transaction(bench.context.sessions) as session:
        if over == "cancelled":
            studies.request_cancel(session, owner_id=OWNER, study_id=study.id)
        else:
            search_rounds.close(session, studies.get(session, owner_id=OWNER, study_id=study.id), "no file")
    found = Proposal(known_arms=len(planned), new_arms=again)
    with transaction(bench.context.sessions) as session:
        assert verdicts.record(session, study.id, looked_at, compare_studies.EMPTY_VERDICT, found) is None
    assert len(read(bench, study).spec["planned"]) == len(planned)
    update_studies(bench.context)
    ended = read(bench, study)
    assert ended.finished_at is not None
    said = {"cancelled": "it was cancelled", "closed": "no file"}[over]
    assert search_rounds.summary(ended)["ended_because"] == said


def test_trials_are_known_as_such(bench: Bench) -> None:
    """Their text is measured on validation rows too, which others' is not."""
    study = search_of(bench, seeds=[1], baseline="as it is")
    other = bench.queued([])
    with transaction(bench.context.sessions) as session:
        arms = {run.arm: run.job.id for run in studies.runs_of(session, study.id)}
        baseline = arms.pop("as it is")
        assert arms
        assert all(studies.is_trial(session, trial) for trial in arms.values())
        assert not studies.is_trial(session, baseline)
        assert not studies.is_trial(session, other)
