"""Failures without a cause and resumes from the wrong checkpoint are violations."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from harness.crash_points import job_in
from verdict import causes, resumes

JOB = "ftjob-1"
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def accepted(**expect: Any) -> dict[str, Any]:
    return {"kind": "accepted", "job": JOB, "expect": expect}


def killed(**more: Any) -> dict[str, Any]:
    return {"kind": "fault", "name": "kill trainer", "done": True, "at": "any time", "job": JOB, **more}


def fired(number: signal.Signals = signal.SIGKILL) -> dict[str, Any]:
    return {"kind": "fired", "role": "engine", "signal": int(number), "job": JOB}


def unexplained(log: list[dict[str, Any]], *outcomes: str, code: str | None = "out_of_memory") -> list[str]:
    """Returns the violations for a job that failed with `code` (None: it succeeded) after these attempts."""
    job = {
        "state": "succeeded" if code is None else "failed",
        "error": None if code is None else {"code": code},
    }
    attempts = [{"job_id": JOB, "outcome": outcome} for outcome in outcomes]
    return causes.unexplained_failures(log, {JOB: job}, attempts, max_deaths=2)


class TestCauses:
    def test_as_many_kills_as_end_a_job_are_a_cause(self) -> None:
        log = [accepted(), killed(), fired()]
        assert unexplained(log, "trainer_died", "trainer_died") == []

    @pytest.mark.parametrize(
        "second", [killed(done=False), killed(at="point"), fired(signal.SIGSTOP), {**fired(), "job": None}]
    )
    def test_what_killed_no_trainer_of_it_is_none(self, second: dict[str, Any]) -> None:
        crashed, failed = unexplained([accepted(), killed(), second], "trainer_died", "trainer_died")
        assert "2 trainers crashed, 1 were killed" in crashed
        assert "failed without a cause, 1 kills" in failed

    @pytest.mark.parametrize("code", ["internal_error", "stalled", "worker_lost", "storage_damaged"])
    def test_no_kill_explains_another_end(self, code: str) -> None:
        assert "failed without a cause" in unexplained([accepted(), killed(), killed()], code=code)[0]

    def test_a_trainer_that_always_dies(self) -> None:
        log = [accepted(dies=True)]
        assert unexplained(log, *["trainer_died"] * 2, code="trainer_died") == []
        assert "which it must not" in unexplained(log, "succeeded", code=None)[0]

    def test_a_bad_file_fails_at_once_and_with_its_own_code(self) -> None:
        log = [accepted(bad=True, code="invalid_file")]
        assert unexplained(log, "failed", code="invalid_file") == []
        assert "without a cause" in unexplained(log, "failed", code="out_of_memory")[0]
        assert "rejected 2 times" in unexplained(log, "failed", "failed", code="invalid_file")[0]

    def test_a_trainer_that_died_of_itself_counts_although_the_job_succeeded(self) -> None:
        assert unexplained([accepted(), killed()], "trainer_died", "succeeded", code=None) == []
        assert "1 trainers crashed, 0 were killed" in unexplained([accepted()], "trainer_died", code=None)[0]


def attempt(number: int) -> dict[str, Any]:
    return {"job_id": JOB, "number": number, "started_at": at(10 * number)}


def saved(name: str, number: int, step: int, removed: float | None = None) -> dict[str, Any]:
    return {
        "id": name, "job_id": JOB, "attempt": number, "step": step, "created_at": at(10 * number + step),
        "removed_at": None if removed is None else at(removed),
    }  # fmt: skip


def began(number: int, step: int) -> dict[str, Any]:
    return {"job_id": JOB, "attempt": number, "data": {"code": "STARTED", "resumed_from": step}}


def warned(number: int, name: str) -> dict[str, Any]:
    data = {"code": "WARNING", "signature": "damaged_checkpoint", "checkpoint": name}
    return {"job_id": JOB, "attempt": number, "data": data}


def hurt(*names: str, during: int = 1) -> dict[str, Any]:
    return {"kind": "fault", "attempt": during, "damaged": [{"checkpoint": name} for name in names]}


class TestResumed:
    """One attempt that saved steps 2 and 4 (and 1, long given up), and the one after it."""

    @staticmethod
    def wrongly(log: list[dict[str, Any]], *events: dict[str, Any]) -> list[str]:
        saves = [saved("old", 1, 1, removed=15), saved("a", 1, 2, removed=99), saved("b", 1, 4)]
        return resumes.wrong_resumes(log, [attempt(1), attempt(2)], saves, [began(1, 0), *events])

    def test_the_newest_is_where_it_goes_on(self) -> None:
        assert self.wrongly([], began(2, 4)) == []
        assert self.wrongly([], began(2, 2)) == [
            f"{JOB}, attempt 2: resumed from step 2 past [], not from 4 past []"
        ]
        assert "from step 0" in self.wrongly([], began(2, 0))[0]

    def test_a_damaged_one_is_passed_over_for_the_one_before(self) -> None:
        log = [hurt("b")]
        assert self.wrongly(log, warned(2, "b"), began(2, 2)) == []
        assert "from step 4" in self.wrongly(log, began(2, 4))[0], "it was loaded"
        assert "past []" in self.wrongly(log, began(2, 2))[0], "nobody was told"

    def test_two_damaged_ones_leave_the_beginning(self) -> None:
        events = [warned(2, "b"), warned(2, "a")]
        assert self.wrongly([hurt("a", "b")], *events, began(2, 0)) == []
        assert len(self.wrongly([hurt("a", "b")], *events, began(2, 1))) == 1

    def test_a_whole_one_is_not_called_damaged(self) -> None:
        reported, elsewhere = self.wrongly([], warned(2, "b"), began(2, 2))
        assert "was reported as damaged and was not" in reported
        assert "not from 4" in elsewhere
        assert "was not" in self.wrongly([hurt("b", during=2)], warned(2, "b"))[0], (
            "damaged after it was read"
        )


@pytest.mark.parametrize(
    ("folder", "job"),
    [("/x/files/ftjob-aB3_-abc12_x", "ftjob-aB3_"), ("/x/files/export-abc", None), ("/", None)],
)
def test_a_trainer_is_known_by_the_folder_it_works_in(folder: str, job: str | None) -> None:
    assert job_in(folder) == job
