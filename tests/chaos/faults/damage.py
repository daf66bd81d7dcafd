"""Stored bytes that are not what they were: a file cut short, or with one bit turned over.

`damage_checkpoint` does it to a job that trains, and in such a way that the job meets it: its trainer stands still
meanwhile and then dies, so that the damaged checkpoint is the one it would go on from.
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
from faults.frozen import stopped
from faults.kills import PROMPT_SECONDS
from harness.chaos_stack import ChaosStack
from harness.crash_points import job_in
from psycopg.rows import dict_row

from cli.stack.process import wait_until

#: So long nothing new was written of a job whose trainer stands still: nothing more is to come.
_STILL_SECONDS = 0.4
#: Of both checkpoints that a job could go on from, now and then: it has to begin at the beginning.
_BOTH = 0.3
_RESUMABLE = """
    SELECT c.id, c.storage_key, c.manifest, c.step, j.attempt
    FROM checkpoints c JOIN jobs j ON j.id = c.job_id
    WHERE c.job_id = %s AND c.removed_at IS NULL AND j.state = 'running'
    AND j.cancel_requested_at IS NULL AND j.pause_requested_at IS NULL
    ORDER BY c.attempt DESC, c.step DESC, c.created_at DESC LIMIT 2
"""


def damage_checkpoint(stack: ChaosStack, random: Random) -> dict[str, Any]:
    """Wait for a job that trains and has saved something, and damage what it would resume from."""
    how_many = 2 if random.random() < _BOTH else 1
    done: dict[str, Any] = {"done": False, "reason": "no job trains that has saved a checkpoint"}

    def met() -> bool:
        stack.start()
        for trainer in stack.look().get("engine", []):
            found = _damage_under(stack, random, trainer, how_many)
            if found["done"]:
                done.clear()
                done.update(found)
                return True
        return False

    wait_until(met, seconds=2 * PROMPT_SECONDS)
    return done


def _damage_under(
    stack: ChaosStack, random: Random, trainer: psutil.Process, how_many: int
) -> dict[str, Any]:
    hurt: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    job_id = None
    with suppress(OSError, psutil.Error, psycopg.Error):
        job_id = job_in(trainer.cwd())
        if job_id is None or not _resumable(stack, job_id):
            return {"done": False}
        with stopped([trainer]):
            rows = _when_still(stack, job_id)
            for row in rows[:how_many]:
                hurt.append(_damage_one(stack, random, row))
            if hurt:
                trainer.kill()
    if not hurt:
        return {"done": False}
    return {"done": True, "job": job_id, "attempt": rows[0]["attempt"], "pid": trainer.pid, "damaged": hurt}


def _when_still(stack: ChaosStack, job_id: str) -> list[dict[str, Any]]:
    """What it could resume from, once its worker has stored all that the trainer had said."""
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
    # What lies in the bundle of a stage's end is a model as well, and is judged as one.
    name = random.choice(sorted(name for name in row["manifest"] if not name.startswith("bundle/")))
    how = damage(random, stack.home.artifacts / row["storage_key"] / name)
    return {"checkpoint": row["id"], "step": row["step"], "how": how}


def damage(random: Random, path: Path) -> str:
    """Cut a file short, or turn one bit of it over; says what was done."""
    size = path.stat().st_size
    if size == 0 or random.random() < 0.5:
        cut = random.randrange(size) if size else 0
        os.truncate(path, cut)
        return f"{path.name} cut from {size} to {cut}"
    with path.open("r+b") as file:
        place = random.randrange(size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))
    return f"{path.name} bit at {place}"
