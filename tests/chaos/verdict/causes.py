"""Jobs that failed, and trainers that died: each only for a reason that the log knows. It does NOT look at the results.

What a campaign does to a trainer it writes down with the job's id: kills at any time (`fault`), kills at a named point
(`fired`), and the jobs whose trainer dies by itself or whose file is bad are their users' own (`accepted`).
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable
from typing import Any

from clients.evidence import Entry

Row = dict[str, Any]
_DEATHS = ("trainer_died", "out_of_memory")


def killed_trainers(log: Iterable[Entry]) -> Counter[str]:
    """How often each job's trainer was killed from outside."""
    killed: Counter[str] = Counter()
    for entry in log:
        at_any_time = entry["kind"] == "fault" and entry.get("done") and entry.get("at") != "point"
        at_point = entry["kind"] == "fired" and entry["signal"] == signal.SIGKILL
        if (at_any_time or at_point) and entry.get("job"):
            killed[entry["job"]] += 1
    return killed


def unfounded(log: list[Entry], jobs: dict[str, Row], attempts: list[Row], *, max_deaths: int) -> list[str]:
    """Deaths of trainers that nobody brought about, and failed jobs that could have gone on."""
    expected = {entry["job"]: entry["expect"] for entry in log if entry["kind"] == "accepted"}
    killed = killed_trainers(log)
    died = Counter(row["job_id"] for row in attempts if row["outcome"] == "trainer_died")
    wrong = []
    for job_id, job in jobs.items():
        expect = expected.get(job_id, {})
        if died[job_id] > killed[job_id] and not expect.get("dies"):
            wrong.append(f"{job_id}: {died[job_id]} trainers died, {killed[job_id]} were killed")
        if job["state"] == "failed" and not _may_fail(job, expect, killed[job_id], max_deaths):
            wrong.append(f"{job_id} failed without a cause, {killed[job_id]} kills: {job['error']}")
        if job["state"] == "succeeded" and (expect.get("bad") or expect.get("dies")):
            wrong.append(f"{job_id} succeeded, which it can not")
    wrong += _tried_again(expected, attempts)
    return wrong


def _may_fail(job: Row, expect: dict[str, Any], killed: int, max_deaths: int) -> bool:
    code = job["error"]["code"]
    if expect.get("bad"):
        return bool(code == expect["code"])
    if code not in _DEATHS:
        return False  # nothing that a campaign does brings a job to any other end
    return bool(expect.get("dies")) or killed >= max_deaths


def _tried_again(expected: dict[str, dict[str, Any]], attempts: list[Row]) -> list[str]:
    """A user's mistake is never retried: once it was found, the job is over."""
    found = Counter(row["job_id"] for row in attempts if row["outcome"] == "failed")
    return [
        f"{job_id}: its bad file was found {found[job_id]} times"
        for job_id, expect in expected.items()
        if expect.get("bad") and found[job_id] > 1
    ]
