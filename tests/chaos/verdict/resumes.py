"""Checks that every attempt resumed from the newest undamaged checkpoint.

It compares the rows of the checkpoints, the damage in the log, and the events.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from clients.client_log import Entry

Row = dict[str, Any]
_MAX_TRIED = 2


def damaged(log: Iterable[Entry]) -> dict[str, int]:
    """Returns the damaged checkpoints, each with the attempt during which it was damaged."""
    return {
        checkpoint["checkpoint"]: entry["attempt"]
        for entry in log
        if entry["kind"] == "fault" and "damaged" in entry
        for checkpoint in entry["damaged"]
    }


def wrong_resumes(
    log: list[Entry], attempts: list[Row], checkpoints: list[Row], events: list[Row]
) -> list[str]:
    """Returns attempts that resumed from the wrong step, and undamaged checkpoints that were reported as damaged."""
    damage = damaged(log)
    passed_over: dict[tuple[str, int], set[str]] = defaultdict(set)
    begun: dict[tuple[str, int], int] = {}
    wrong = []
    for event in events:
        attempt_key, data = (event["job_id"], event["attempt"]), event["data"]
        if data.get("signature") == "damaged_checkpoint":
            passed_over[attempt_key].add(data["checkpoint"])
            if damage.get(data["checkpoint"], event["attempt"]) >= event["attempt"]:
                wrong.append(f"{event['job_id']}: {data['checkpoint']} was reported as damaged and was not")
        if data["code"] == "STARTED" and "resumed_from" in data:
            begun[attempt_key] = data["resumed_from"]
    saved: dict[str, list[Row]] = defaultdict(list)
    for row in checkpoints:
        saved[row["job_id"]].append(row)
    for attempt in attempts:
        job_id, number = attempt["job_id"], attempt["number"]
        attempt_key = (job_id, number)
        if attempt_key not in begun:
            continue  # it ended before its trainer started, or the real engine ran it
        tried, step = _expected_resume(saved[job_id], attempt, damage)
        if (tried, step) != (passed_over[attempt_key], begun[attempt_key]):
            wrong.append(
                f"{job_id}, attempt {number}: resumed from step {begun[attempt_key]} past "
                f"{sorted(passed_over[attempt_key])}, "
                f"not from {step} past {sorted(tried)}"
            )
    return wrong


def _expected_resume(saved: list[Row], attempt: Row, damage: dict[str, int]) -> tuple[set[str], int]:
    """Returns the damaged checkpoints that this attempt has to pass over, and the step that it has to resume from."""
    at, number = attempt["started_at"], attempt["number"]
    available = [
        row
        for row in saved
        if row["attempt"] < number and (row["removed_at"] is None or row["removed_at"] > at)
    ]
    available.sort(key=lambda row: (row["attempt"], row["step"], row["created_at"]), reverse=True)
    tried: set[str] = set()
    for row in available[:_MAX_TRIED]:
        if damage.get(row["id"], number) >= number:
            return tried, row["step"]
        tried.add(row["id"])
    return tried, 0
