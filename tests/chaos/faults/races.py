"""A cancel that meets a claim or an end just as it happens: the worker stands still at that commit meanwhile.

Before the commit it holds the job's row, so that the cancel has to wait for it. It does NOT judge who should win.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from clients.evidence import Evidence
from clients.user import ENDED, JOBS, Client
from faults.kills import Kills
from harness.chaos_stack import ROLES, ChaosStack

_RACED = (
    "commit worker.jobs.attempt._claim",
    "commit finish_prepared",
    "commit finish_succeeded",
    "commit record_crash",
)
#: The cancels have been sent and are being worked on.
_UNDER_WAY_SECONDS = 0.7


def cancel_at_point(stack: ChaosStack, log: Evidence, kills: Kills) -> dict[str, Any]:
    """Every unfinished job is cancelled, for any of them may be the one that is being claimed or ended."""
    point, side = kills.random.choice(_RACED), kills.random.choice(("before", "after"))
    what = kills.at_point(ROLES, f"{point}|{side}", 0, signal.SIGSTOP)
    if not what["done"]:
        return what
    try:
        threads = [
            threading.Thread(target=_cancel, args=(stack, log, job_id)) for job_id in _unfinished(stack, log)
        ]
        for thread in threads:
            thread.start()
        time.sleep(_UNDER_WAY_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.kill(what["pid"], signal.SIGCONT)
    for thread in threads:
        thread.join()
    return {**what, "cancelled": len(threads)}


def _unfinished(stack: ChaosStack, log: Evidence) -> list[str]:
    client = Client(stack.url, stack.key, log)
    answer = client.once("GET", JOBS, params={"limit": 20})
    client.close()
    if answer is None or answer.status_code != 200:
        return []
    return [job["id"] for job in answer.json()["data"] if job["status"] not in ENDED]


def _cancel(stack: ChaosStack, log: Evidence, job_id: str) -> None:
    client = Client(stack.url, stack.key, log)
    client.once("POST", f"{JOBS}/{job_id}/cancel")
    client.close()
