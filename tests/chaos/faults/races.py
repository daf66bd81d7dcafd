"""Cancels jobs while a worker is frozen at the commit of a claim or an end.

Frozen before the commit, the worker holds the lock of the job's row, and the cancel waits for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from clients.client_log import ClientLog
from clients.user import ENDED, JOBS, Client
from faults.kills import CLAIM, Kills
from harness.chaos_stack import ROLES, ChaosStack

from store.jobs import endings

_RACED = (
    CLAIM,
    *(f"commit {function.__name__}" for function in (endings.finish_prepared, endings.finish_succeeded)),
    f"commit {endings.record_crash.__name__}",
)
#: The time after which the cancel requests have reached the database.
_RACE_SECONDS = 0.7


def cancel_at_point(stack: ChaosStack, log: ClientLog, kills: Kills) -> dict[str, Any]:
    """Cancels every unfinished job: any of them may be the one that is claimed or ended."""
    point, side = kills.random.choice(_RACED), kills.random.choice(("before", "after"))
    outcome = kills.at_point(ROLES, f"{point}|{side}", 0, signal.SIGSTOP)
    if not outcome["done"]:
        return outcome
    try:
        threads = [
            threading.Thread(target=_cancel, args=(stack, log, job_id)) for job_id in _unfinished(stack, log)
        ]
        for thread in threads:
            thread.start()
        time.sleep(_RACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.kill(outcome["pid"], signal.SIGCONT)
    for thread in threads:
        thread.join()
    return {**outcome, "cancelled": len(threads)}


def _unfinished(stack: ChaosStack, log: ClientLog) -> list[str]:
    client = Client(stack.url, stack.key, log)
    answer = client.send("GET", JOBS, params={"limit": 20})
    client.close()
    if answer is None or answer.status_code != 200:
        return []
    return [job["id"] for job in answer.json()["data"] if job["status"] not in ENDED]


def _cancel(stack: ChaosStack, log: ClientLog, job_id: str) -> None:
    client = Client(stack.url, stack.key, log)
    client.send("POST", f"{JOBS}/{job_id}/cancel")
    client.close()
