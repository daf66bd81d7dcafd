"""`kill -9`, at any time or at a named point, of each kind of process. It does NOT choose when: `faults` does."""

from __future__ import annotations

import json
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
from harness.chaos_stack import ROLES, ChaosStack
from harness.crash_points import job_in

from cli.stack.process import wait_until

#: Kinds of process that are killed, each as often as the others. The supervisor of a job is its worker; the reconciler
#: is a thread of every worker, killed while it holds its lock.
KILLED = ("api", "worker", "prepare", "trainer", "reconciler", "postgres", "valkey", "up")
#: What a worker's process is killed at.
WORKER_POINTS = (
    "commit claim", "commit finish_prepared", "commit finish_succeeded", "commit finish_cancelled",
    "commit finish_paused", "commit record_event", "commit record_checkpoint", "commit release",
    "commit record_crash", "commit worker.jobs.attempt._claim", "commit worker.jobs.attempt.renew_lease",
    "commit worker.chores.presence", "commit worker.jobs.export", "publish heft.train",
    "publish heft.prepare", "publish heft.export",
    "rename store.storage.atomic_write", "fsync store.storage.atomic_write", "commit", "publish", "rename", "fsync",
)  # fmt: skip
_API_POINTS = ("commit _create", "commit _record", "commit request_cancel", "commit request_pause", "commit resume",
               "publish heft.prepare", "rename store.storage.atomic_write", "fsync store.storage.atomic_write",
               "commit", "publish")  # fmt: skip
_TRAINER_POINTS = ("rename", "fsync")
SWEEP = "commit worker.chores.reconcile.recover_lost"
#: How long a process, a point or a moment is waited for.
PROMPT_SECONDS = 6.0


class Kills:
    """Counts what it really killed, by kind."""

    def __init__(self, stack: ChaosStack, random: Random) -> None:
        self.stack, self.random = stack, random
        self.done: Counter[str] = Counter()

    def kill(self, kind: str) -> dict[str, Any]:
        at_point = self.random.random() < 0.5
        pick = self.random.random()
        if kind == "reconciler":
            done = self._kill_at(ROLES, SWEEP, "before", 0)
        elif kind in ("postgres", "valkey", "up"):
            done = self._kill_now(kind, pick)
        elif at_point:
            points = {"api": _API_POINTS, "trainer": _TRAINER_POINTS}.get(kind, WORKER_POINTS)
            roles = {"worker": ("train", "train-2"), "trainer": ("engine",)}.get(kind, (kind,))
            side = self.random.choice(("before", "after"))
            point = points[int(pick * len(points))]
            done = self._kill_at(roles, point, side, self.random.randrange(4))
            if not done["done"]:
                done |= self._kill_now(kind, pick)
        else:
            done = self._kill_now(kind, pick)
        self.done[kind] += bool(done["done"])
        return done

    def _kill_now(self, kind: str, pick: float) -> dict[str, Any]:
        roles = {"worker": ("train", "train-2"), "trainer": ("engine",)}.get(kind, (kind,))
        targets: list[psutil.Process] = []

        def there() -> bool:
            self.stack.start()
            found = self.stack.look()
            targets[:] = [process for role in roles for process in found.get(role, [])]
            return bool(targets)

        if not wait_until(there, seconds=PROMPT_SECONDS):
            return {"done": False, "reason": f"no {kind} lives"}
        if kind == "postgres" and pick < 0.3:
            # One of its processes: the server then restarts itself, and every connection is lost.
            with suppress(psutil.Error):
                targets = targets[0].children() or targets
        target = targets[int(pick * len(targets))]
        return kill(target) or {"done": False, "reason": "it was just gone"}

    def _kill_at(self, roles: tuple[str, ...], point: str, side: str, skip: int) -> dict[str, Any]:
        return self.at_point(roles, f"{point}|{side}", skip, signal.SIGKILL)

    def at_point(
        self, roles: tuple[str, ...], point: str, skip: int, number: signal.Signals
    ) -> dict[str, Any]:
        """Have the first process of these roles that comes there do it to itself."""
        fired = self.stack.control / "fired.jsonl"
        before = fired.read_text().count("\n") if fired.exists() else 0
        name, _, side = point.partition("|")
        order = {"match": name, "side": side, "skip": skip, "signal": int(number), "n": self.random.random()}
        for role in roles:
            write(self.stack.control / f"{role}.armed", json.dumps(order))

        def has_fired() -> bool:
            self.stack.start()
            return fired.exists() and fired.read_text().count("\n") > before

        done = wait_until(has_fired, seconds=PROMPT_SECONDS)
        for role in roles:
            (self.stack.control / f"{role}.armed").unlink(missing_ok=True)
        # One may have taken the order at the last moment.
        done = done or has_fired()
        if not done:
            return {"done": False, "reason": f"nobody came to {point}"}
        return {"done": True, "at": "point", **json.loads(fired.read_text().splitlines()[before])}


def kill(process: psutil.Process) -> dict[str, Any] | None:
    """What was done, with the job that a trainer was at; None when it was gone already."""
    try:
        job = job_in(process.cwd())
        process.kill()
    except psutil.Error:
        return None
    return {"done": True, "at": "any time", "pid": process.pid} | ({"job": job} if job else {})


def write(path: Path, text: str) -> None:
    """All of it at once, for whoever reads it."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(text)
    partial.rename(path)
