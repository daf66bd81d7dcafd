"""The cause of a failure of several workers: a member's error, waited for, before its consequence on machine 0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from store.jobs.groups import MemberFailures
from worker.jobs.member_failures import Error, first_cause

SILENT = MemberFailures(error=None, have_all_ended=False)


def error(code: str, message: str = "m") -> dict[str, object]:
    return {"code": code, "message": message, "param": None}


LOST = error("rank_lost", "of machine 0")


def failed(code: str, *, have_all_ended: bool = False) -> MemberFailures:
    return MemberFailures(error=error(code, "of a member"), have_all_ended=have_all_ended)


def cause(mine: Error, reads: list[MemberFailures], seconds: float = 60.0) -> tuple[Error, int]:
    """Returns the cause, and how often it was waited for. Pauses end at once, and too many fail."""
    answers: Iterator[MemberFailures] = iter(reads)
    pauses = []

    def pause() -> bool:
        pauses.append(1)
        return False

    return first_cause(mine, lambda: next(answers), pause, seconds=seconds), len(pauses)


def test_a_cause_that_comes_later_is_waited_for() -> None:
    first_error, pauses = cause(LOST, [SILENT, failed("rank_lost"), failed("model_not_found")])
    assert (first_error["code"], pauses) == ("model_not_found", 2)


def test_members_that_have_ended_say_no_more() -> None:
    consequence, pauses = cause(LOST, [SILENT, failed("rank_lost", have_all_ended=True)])
    assert (consequence, pauses) == (error("rank_lost", "of a member"), 1)
    assert cause(LOST, [MemberFailures(error=None, have_all_ended=True)]) == (LOST, 0)


def test_a_crash_of_machine_0_is_not_explained_by_its_consequence() -> None:
    crash = error("out_of_memory", "killed")
    assert cause(crash, [failed("rank_lost", have_all_ended=True)]) == (crash, 0)
    assert cause(crash, [failed("invalid_config")])[0]["code"] == "invalid_config"


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_member_that_never_answers_is_not_waited_for_forever(seconds: float) -> None:
    assert cause(LOST, [SILENT], seconds) == (LOST, 0)


def test_a_worker_that_is_asked_to_stop_does_not_wait() -> None:
    assert first_cause(LOST, lambda: SILENT, lambda: True) == LOST
