"""Checks that every failed job and every crashed trainer has a cause in the log.

The log has the job of each trainer that was killed at any time (`fault`) or at a crash point (`fired`), and the jobs
whose trainer crashes by itself or whose file is bad (`accepted`).
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable
from typing import Any

from clients.client_log import Entry

Row = dict[str, Any]
_DEATHS = ("trainer_died", "out_of_memory")


def killed_trainers(log: Iterable[Entry]) -> Counter[str]:
    """Returns how often each job's trainer was killed."""
    killed: Counter[str] = Counter()
    for entry in log:
        at_any_time = entry["kind"] == "fault" and entry.get("done") and entry.get("at") != "point"
        at_point = entry["kind"] == "fired" and entry["signal"] == signal.SIGKILL
        if (at_any_time or at_point) and entry.get("job"):
            killed[entry["job"]] += 1
    return killed


def unexplained_failures(
    log: list[Entry], jobs: dict[str, Row], attempts: list[Row], *, max_deaths: int
) -> list[str]:
    """Returns crashes of trainers that were not injected, and failed jobs without a cause."""
    expected = {entry["job"]: entry["expect"] for entry in log if entry["kind"] == "accepted"}
    killed = killed_trainers(log)
    crashed = Counter(row["job_id"] for row in attempts if row["outcome"] == "trainer_died")
    wrong = []
    for job_id, job in jobs.items():
        expect = expected.get(job_id, {})
        if crashed[job_id] > killed[job_id] and not expect.get("dies"):
            wrong.append(f"{job_id}: {crashed[job_id]} trainers crashed, {killed[job_id]} were killed")
        if job["state"] == "failed" and not _may_fail(job, expect, killed[job_id], max_deaths):
            wrong.append(f"{job_id} failed without a cause, {killed[job_id]} kills: {job['error']}")
        if job["state"] == "succeeded" and (expect.get("bad") or expect.get("dies")):
            wrong.append(f"{job_id} succeeded, which it must not")
    wrong += _retried_mistakes(expected, attempts)
    return wrong


def _may_fail(job: Row, expect: dict[str, Any], killed: int, max_deaths: int) -> bool:
    code = job["error"]["code"]
    if expect.get("bad"):
        return bool(code == expect["code"])
    if code not in _DEATHS:
        return False  # no fault leads to another error
    return bool(expect.get("dies")) or killed >= max_deaths


def _retried_mistakes(expected: dict[str, dict[str, Any]], attempts: list[Row]) -> list[str]:
    """Returns jobs with a bad file that were validated again: a user's mistake is never retried."""
    rejected = Counter(row["job_id"] for row in attempts if row["outcome"] == "failed")
    return [
        f"{job_id}: its bad file was rejected {rejected[job_id]} times"
        for job_id, expect in expected.items()
        if expect.get("bad") and rejected[job_id] > 1
    ]
