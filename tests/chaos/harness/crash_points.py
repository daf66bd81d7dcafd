"""Crash points: a process under test kills or freezes itself before or after a commit, publish, rename or fsync.

`launch` patches the few functions through which all of these go. The service's code has no crash points of its own, and
every new commit or rename becomes one without a change here.

A point is named by the call and its caller: `commit finish_succeeded`,
`commit worker.chores.reconcile.recover_lost`, `publish heft.train`, `fsync store.storage.atomic_write.commit`,
`rename heft_engine.runtime.sealed_directory.seal`.
`<control>/<role>.armed` says which point, which side of it and which signal, for one crossing.
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

#: Packages whose frames name a point.
_PACKAGES = ("api", "worker", "store", "heft_engine", "cli", "__main__")
#: Modules that commit for others: the local variable with the function that they run in the transaction.
_TRANSACTION_VARIABLES = {"api.database": "work", "worker.jobs.attempt": "operation"}

#: The name of an attempt's folder (worker.jobs.attempt).
_FOLDER = re.compile(r"(ftjob-\w+)-\w+")


class CrashPoints:
    """The crash points of one process. `role`: `api`, `train`, `train-2`, `prepare` or `engine`."""

    def __init__(self, control: Path, role: str) -> None:
        self._armed = control / f"{role}.armed"
        self._fired = control / "fired.jsonl"
        self._clock = control / "clock"
        self._role = role
        self._crossed = 0
        self._order: str | None = None
        self._write, self._open = os.write, os.open

    def install(self, *, database: bool) -> None:
        """Patches this process, before anything of the service is imported. `database`: commits and publishes too."""
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
        """Patches `time.time` to add the seconds in `<control>/clock`, as if the wall clock were set."""
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
    """Returns the job of an attempt's folder, the working directory of its trainer; None for other folders."""
    match = _FOLDER.fullmatch(Path(folder).name)
    return match[1] if match else None


def _caller() -> str:
    """Returns the name of the function that a transaction runs, or else `module.function` of the innermost frame."""
    frame: FrameType | None = sys._getframe(2)
    caller = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        variable = _TRANSACTION_VARIABLES.get(module)
        operation = frame.f_locals.get(variable) if variable is not None else None
        if callable(operation):
            return _name(operation)
        # `transaction` commits for its caller, which is further out.
        if not caller and module.partition(".")[0] in _PACKAGES and module != "store.db.session":
            caller = f"{module}.{frame.f_code.co_name}"
            if module != "worker.jobs.attempt":
                return caller
        frame = frame.f_back
    return caller or "unknown"


def _name(operation: Any) -> str:
    while isinstance(operation, functools.partial):
        operation = operation.func
    return str(getattr(operation, "__name__", operation))
