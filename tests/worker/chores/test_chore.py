from __future__ import annotations

import threading

from worker_bench import eventually

from worker.chores.chore import Chore, run_chores


def test_a_chore_that_raised_runs_again() -> None:
    turns: list[int] = []

    def fail() -> None:
        turns.append(len(turns))
        raise ZeroDivisionError

    with run_chores([Chore(name="failing", seconds=0.01, run=fail)]):
        eventually(lambda: len(turns) >= 3)
    assert "failing" not in [thread.name for thread in threading.enumerate()]
