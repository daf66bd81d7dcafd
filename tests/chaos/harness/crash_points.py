"""Named places at which a process under test kills or freezes itself: before and after every commit, publish, rename
and fsync that it makes.

They are put in from outside, by `launch`, into the few functions through which all of these go. The service's own code
has none, so nothing can ever trip over one in production, and no place is forgotten: what is committed or renamed
tomorrow is a crash point tomorrow.

A point is named by what happens and who does it: `commit finish_succeeded`,
`commit worker.chores.reconcile.recover_lost`, `publish heft.train`, `fsync store.storage.atomic_write.commit`,
`rename heft_engine.runtime.sealed_directory.seal`.
It does NOT know which fault is wanted: `<control>/<role>.armed` says that, for one crossing.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

#: Whose frames name a point.
_OURS = ("api", "worker", "store", "heft_engine", "cli", "__main__")
#: Frames through which every commit goes: the one who asked for it stands in these local names.
_DOORS = {"api.database": "work", "worker.jobs.attempt": "operation"}

#: What an attempt's folder is called (worker.jobs.attempt).
_FOLDER = re.compile(r"(ftjob-\w+)-\w+")


class CrashPoints:
    """What one process does at its points. `role`: `api`, `train`, `train-2`, `prepare` or `engine`."""

    def __init__(self, control: Path, role: str) -> None:
        self._armed = control / f"{role}.armed"
        self._fired = control / "fired.jsonl"
        self._clock = control / "clock"
        self._role = role
        self._crossed = 0
        self._order: str | None = None
        self._write, self._open = os.write, os.open

    def install(self, *, database: bool) -> None:
        """Before anything of the service is imported. `database`: also what the store's processes do."""
        self._shift_clock()
        for name in ("fsync", "rename", "replace"):
            setattr(os, name, self._around(name, getattr(os, name)))
        if database:
            import psycopg
            from celery import Celery

            psycopg.Connection.commit = self._around("commit", psycopg.Connection.commit)
            Celery.send_task = self._around("publish", Celery.send_task)

    def _around(self, kind: str, do: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(do)
        def crossing(*args: Any, **kwargs: Any) -> Any:
            if not self._armed.exists():
                return do(*args, **kwargs)
            name = f"{kind} {args[1] if kind == 'publish' else _caller()}"
            self._cross(name, "before")
            result = do(*args, **kwargs)
            self._cross(name, "after")
            return result

        return crossing

    def _cross(self, name: str, side: str) -> None:
        try:
            text = self._armed.read_text()
            order = json.loads(text)
        except (OSError, ValueError):
            return
        if text != self._order:
            self._order, self._crossed = text, 0
        if order["match"] not in name or order["side"] != side:
            return
        self._crossed += 1
        if self._crossed <= order["skip"]:
            return
        try:
            self._armed.unlink()
        except FileNotFoundError:
            return  # another process of this role was first
        record = {
            "role": self._role,
            "pid": os.getpid(),
            "point": f"{side} {name}",
            "signal": order["signal"],
            "job": job_in(os.getcwd()) if self._role == "engine" else None,
        }
        log = self._open(self._fired, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._write(log, json.dumps(record).encode() + b"\n")
        os.kill(os.getpid(), signal.Signals(order["signal"]))

    def _shift_clock(self) -> None:
        """Wall clocks are set, by people and by daemons: `time.time` jumps by what stands in `<control>/clock`."""
        real = time.time
        state = {"look_at": 0.0, "offset": 0.0}

        def shifted() -> float:
            now = real()
            if now >= state["look_at"]:
                state["look_at"] = now + 0.2
                try:
                    state["offset"] = float(self._clock.read_text())
                except (OSError, ValueError):
                    state["offset"] = 0.0
            return now + state["offset"]

        time.time = shifted


def job_in(folder: str) -> str | None:
    """The job whose attempt this folder is for: a trainer works in one."""
    found = _FOLDER.fullmatch(Path(folder).name)
    return found[1] if found else None


def _caller() -> str:
    """Who of the service asks: a function of the store where the frame at its door knows it, else module.function."""
    frame: FrameType | None = sys._getframe(2)
    named = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        door = _DOORS.get(module)
        work = frame.f_locals.get(door) if door is not None else None
        if callable(work):
            return _name(work)
        # The store's transactions commit for somebody; whoever that is, is further out.
        if not named and module.partition(".")[0] in _OURS and module != "store.db.session":
            named = f"{module}.{frame.f_code.co_name}"
            if module != "worker.jobs.attempt":
                return named
        frame = frame.f_back
    return named or "somewhere"


def _name(work: Any) -> str:
    while isinstance(work, functools.partial):
        work = work.func
    return str(getattr(work, "__name__", work))
