"""Where every attempt went on from: the newest checkpoint that is whole, and never one that was damaged.

Worked out from the checkpoints' rows, the damage that the log tells of, and the events; it does NOT read bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from clients.evidence import Entry

Row = dict[str, Any]
_TRIED = 2


def damaged(log: Iterable[Entry]) -> dict[str, int]:
    """Damaged checkpoints, and the attempt during which that happened."""
    return {
        one["checkpoint"]: entry["attempt"]
        for entry in log
        if entry["kind"] == "fault" and "damaged" in entry
        for one in entry["damaged"]
    }


def wrongly(log: list[Entry], attempts: list[Row], checkpoints: list[Row], events: list[Row]) -> list[str]:
    """Attempts that began elsewhere than they should, and damage that was reported where there is none."""
    hurt = damaged(log)
    passed_over: dict[tuple[str, int], set[str]] = defaultdict(set)
    begun: dict[tuple[str, int], int] = {}
    wrong = []
    for event in events:
        place, data = (event["job_id"], event["attempt"]), event["data"]
        if data.get("signature") == "damaged_checkpoint":
            passed_over[place].add(data["checkpoint"])
            if hurt.get(data["checkpoint"], event["attempt"]) >= event["attempt"]:
                wrong.append(f"{event['job_id']}: {data['checkpoint']} is said to be damaged, and was not")
        if data["code"] == "STARTED" and "resumed_from" in data:
            begun[place] = data["resumed_from"]
    saved: dict[str, list[Row]] = defaultdict(list)
    for row in checkpoints:
        saved[row["job_id"]].append(row)
    for attempt in attempts:
        job_id, number = attempt["job_id"], attempt["number"]
        place = (job_id, number)
        if place not in begun:
            continue  # it ended before its trainer had begun, or the real engine ran it
        tried, step = _way(saved[job_id], attempt, hurt)
        if (tried, step) != (passed_over[place], begun[place]):
            wrong.append(
                f"{job_id}, attempt {number}: went on from step {begun[place]} past {sorted(passed_over[place])}, "
                f"not from {step} past {sorted(tried)}"
            )
    return wrong


def _way(saved: list[Row], attempt: Row, hurt: dict[str, int]) -> tuple[set[str], int]:
    """The damaged checkpoints that this attempt has to pass over, and the step it then goes on from."""
    at, number = attempt["started_at"], attempt["number"]
    there = [
        row
        for row in saved
        if row["attempt"] < number and (row["removed_at"] is None or row["removed_at"] > at)
    ]
    there.sort(key=lambda row: (row["attempt"], row["step"], row["created_at"]), reverse=True)
    tried: set[str] = set()
    for row in there[:_TRIED]:
        if hurt.get(row["id"], number) >= number:
            return tried, row["step"]
        tried.add(row["id"])
    return tried, 0
