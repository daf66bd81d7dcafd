"""Damages stored files: truncates one, or flips one of its bits.

`damage_checkpoint` freezes the trainer of a running job, damages the checkpoint that the job would resume from, and
kills the trainer.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import psycopg
from faults.freeze import frozen
from faults.kills import PROMPT_SECONDS
from harness.chaos_stack import ChaosStack
from harness.crash_points import job_in
from psycopg.rows import dict_row

from cli.stack.process import wait_until

#: After this time without a new checkpoint, the worker has stored everything that the frozen trainer had reported.
_STILL_SECONDS = 0.4
#: The share of cases in which both checkpoints are damaged, so that the job must start from step 0.
_BOTH = 0.3
_RESUMABLE = """
    SELECT c.id, c.storage_key, c.manifest, c.step, j.attempt
    FROM checkpoints c JOIN jobs j ON j.id = c.job_id
    WHERE c.job_id = %s AND c.removed_at IS NULL AND j.state = 'running'
    AND j.cancel_requested_at IS NULL AND j.pause_requested_at IS NULL
    ORDER BY c.attempt DESC, c.step DESC, c.created_at DESC LIMIT 2
"""


def damage_checkpoint(stack: ChaosStack, random: Random) -> dict[str, Any]:
    """Waits for a running job with a checkpoint and damages what it would resume from."""
    count = 2 if random.random() < _BOTH else 1
    outcome: dict[str, Any] = {"done": False, "reason": "no running job has a checkpoint"}

    def damage_any() -> bool:
        stack.start()
        for trainer in stack.processes().get("engine", []):
            attempt = _damage_under(stack, random, trainer, count)
            if attempt["done"]:
                outcome.clear()
                outcome.update(attempt)
                return True
        return False

    wait_until(damage_any, seconds=2 * PROMPT_SECONDS)
    return outcome


def _damage_under(stack: ChaosStack, random: Random, trainer: psutil.Process, count: int) -> dict[str, Any]:
    damaged: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    job_id = None
    with suppress(OSError, psutil.Error, psycopg.Error):
        job_id = job_in(trainer.cwd())
        if job_id is None or not _resumable(stack, job_id):
            return {"done": False}
        with frozen([trainer]):
            rows = _when_still(stack, job_id)
            for row in rows[:count]:
                damaged.append(_damage_one(stack, random, row))
            if damaged:
                trainer.kill()
    if not damaged:
        return {"done": False}
    return {
        "done": True,
        "job": job_id,
        "attempt": rows[0]["attempt"],
        "pid": trainer.pid,
        "damaged": damaged,
    }


def _when_still(stack: ChaosStack, job_id: str) -> list[dict[str, Any]]:
    """Returns the checkpoints that it could resume from, once no new ones arrive."""
    rows = _resumable(stack, job_id)
    until = time.monotonic() + PROMPT_SECONDS
    while time.monotonic() < until:
        time.sleep(_STILL_SECONDS)
        before, rows = rows, _resumable(stack, job_id)
        if [row["id"] for row in rows] == [row["id"] for row in before]:
            return rows
    return []


def _resumable(stack: ChaosStack, job_id: str) -> list[dict[str, Any]]:
    url = stack.database_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, row_factory=dict_row, connect_timeout=2) as connection:
        return connection.execute(_RESUMABLE, [job_id]).fetchall()


def _damage_one(stack: ChaosStack, random: Random, row: dict[str, Any]) -> dict[str, Any]:
    # Not a file of a bundle: that is a model as well, which must stay undamaged.
    name = random.choice(sorted(name for name in row["manifest"] if not name.startswith("bundle/")))
    how = damage(random, stack.home.artifacts / row["storage_key"] / name)
    return {"checkpoint": row["id"], "step": row["step"], "how": how}


def damage(random: Random, path: Path) -> str:
    """Truncates a file or flips one of its bits; returns a description."""
    size = path.stat().st_size
    if size == 0 or random.random() < 0.5:
        cut = random.randrange(size) if size else 0
        os.truncate(path, cut)
        return f"{path.name} cut from {size} to {cut}"
    with path.open("r+b") as file:
        position = random.randrange(size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))
    return f"{path.name} bit at {position}"
