"""Kills each kind of process with SIGKILL, at any time or at a crash point."""

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

from api.routes import files as file_routes
from api.routes import jobs as job_routes
from cli.stack.process import wait_until
from store.jobs import endings, jobs, leases
from store.messages.broker import Task
from store.storage import atomic_write
from worker.chores import presence, reconcile
from worker.jobs import attempt, export

#: The kinds of process that are killed, equally often. The reconciler is a thread of every worker: a worker is killed
#: while it holds the reconciler's lock.
KILLED = ("api", "worker", "prepare", "trainer", "reconciler", "postgres", "valkey", "up")
_UPLOAD_POINTS = (f"rename {atomic_write.__name__}", f"fsync {atomic_write.__name__}")
CLAIM = f"commit {attempt.__name__}._claim"
RECONCILE = f"commit {reconcile.__name__}.{reconcile.recover_lost.__name__}"
#: Store functions that a worker runs in a transaction.
_WORKER_COMMITS = (
    endings.finish_prepared, endings.finish_succeeded, endings.finish_cancelled, endings.finish_paused,
    endings.record_crash, endings.release, leases.record_event, leases.record_checkpoint,
)  # fmt: skip
#: Crash points of worker processes.
WORKER_POINTS = (
    CLAIM, f"commit {attempt.__name__}.renew_lease", f"commit {presence.__name__}", f"commit {export.__name__}",
    *(f"commit {function.__name__}" for function in _WORKER_COMMITS),
    *(f"publish {task.value}" for task in (Task.TRAIN, Task.PREPARE, Task.EXPORT)),
    *_UPLOAD_POINTS, "commit", "publish", "rename", "fsync",
)  # fmt: skip
_API_COMMITS = (job_routes._create, file_routes._record, jobs.request_cancel, jobs.request_pause, jobs.resume)
_API_POINTS = (
    *(f"commit {function.__name__}" for function in _API_COMMITS),
    f"publish {Task.PREPARE.value}", *_UPLOAD_POINTS, "commit", "publish",
)  # fmt: skip
_TRAINER_POINTS = ("rename", "fsync")
#: The time that a fault waits for its process or point.
PROMPT_SECONDS = 6.0


class Kills:
    """`done` counts the processes that were killed, by kind."""

    def __init__(self, stack: ChaosStack, random: Random) -> None:
        self.stack, self.random = stack, random
        self.done: Counter[str] = Counter()

    def kill(self, kind: str) -> dict[str, Any]:
        at_point = self.random.random() < 0.5
        pick = self.random.random()
        if kind == "reconciler":
            done = self._kill_at(ROLES, RECONCILE, "before", 0)
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

        def find_targets() -> bool:
            self.stack.start()
            by_role = self.stack.processes()
            targets[:] = [process for role in roles for process in by_role.get(role, [])]
            return bool(targets)

        if not wait_until(find_targets, seconds=PROMPT_SECONDS):
            return {"done": False, "reason": f"no {kind} lives"}
        if kind == "postgres" and pick < 0.3:
            # One of its backends: the server then restarts itself, and every connection is lost.
            with suppress(psutil.Error):
                targets = targets[0].children() or targets
        target = targets[int(pick * len(targets))]
        return kill(target) or {"done": False, "reason": "it had just ended"}

    def _kill_at(self, roles: tuple[str, ...], point: str, side: str, skip: int) -> dict[str, Any]:
        return self.at_point(roles, f"{point}|{side}", skip, signal.SIGKILL)

    def at_point(
        self, roles: tuple[str, ...], point: str, skip: int, number: signal.Signals
    ) -> dict[str, Any]:
        """Makes the first process of these roles that crosses the point send itself this signal."""
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
        # A process may have crossed it at the last moment.
        done = done or has_fired()
        if not done:
            return {"done": False, "reason": f"no process crossed {point}"}
        return {"done": True, "at": "point", **json.loads(fired.read_text().splitlines()[before])}


def kill(process: psutil.Process) -> dict[str, Any] | None:
    """Kills a process; returns the outcome, with the job of a trainer, or None if it had ended already."""
    try:
        job = job_in(process.cwd())
        process.kill()
    except psutil.Error:
        return None
    return {"done": True, "at": "any time", "pid": process.pid} | ({"job": job} if job else {})


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(text)
    partial.rename(path)
