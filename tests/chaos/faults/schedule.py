"""Injects faults into the stack, one after the other, by a schedule that a seed determines.

The same seed gives the same faults, points and pauses. The state of the service in which each strikes depends on the
machine.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import psutil
import redis
from clients.client_log import ClientLog
from faults.damage import damage_checkpoint
from faults.freeze import frozen
from faults.kills import KILLED, PROMPT_SECONDS, RECONCILE, WORKER_POINTS, Kills, write
from faults.races import cancel_at_point
from harness.chaos_stack import LEASE, ROLES, ChaosStack
from kombu.exceptions import OperationalError

from cli.stack.process import wait_until
from store.messages.broker import Task, make_celery


class Injector:
    """Runs the schedule. `kills` and `faults` count the faults that took effect."""

    def __init__(self, stack: ChaosStack, log: ClientLog, seed: int, *, others: float = 0.5) -> None:
        self.stack, self.log = stack, log
        self._seed = seed
        #: The generator of the current fault, new for each one: its draws must not change the faults that follow.
        self.random = Random(seed)
        self._order = Random(seed)
        self._others_share = others
        self._kills = Kills(stack, self.random)
        self.kills = self._kills.done
        self.faults: Counter[str] = Counter()
        self._other_faults: dict[str, Callable[[], dict[str, Any]]] = {
            "worker frozen past its lease": self._freeze_worker,
            "worker frozen at a point past its lease": self._freeze_at_point,
            "trainer frozen": self._freeze_trainer,
            "Postgres stopped at once": self._stop_postgres,
            "Postgres frozen": lambda: self._freeze_server("postgres", 2.5 * LEASE),
            "Valkey frozen": lambda: self._freeze_server("valkey", 4.0),
            "Valkey emptied": self._empty_valkey,
            "hints doubled": self._double_hints,
            "hints reordered or dropped": self._shuffle_hints,
            "connection cut after COMMIT": lambda: self._cut("after"),
            "connection cut before COMMIT": lambda: self._cut("before"),
            "checkpoint damaged": lambda: damage_checkpoint(self.stack, self.random),
            "disk full": self._fill_disk,
            "clock stepped": self._step_clock,
            "cancel at a claim or an end": lambda: cancel_at_point(self.stack, self.log, self._kills),
        }

    def schedule(self, kills: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Yields faults until there were this many kills: rounds of every kind of kill, each in a random order."""
        others: list[str] = []
        while sum(self.kills.values()) < kills:
            for kind in self._order.sample(KILLED, len(KILLED)):
                yield f"kill {kind}", lambda kind=kind: self._kills.kill(kind)
                if self._order.random() < self._others_share:
                    others = others or self._order.sample(list(self._other_faults), len(self._other_faults))
                    name = others.pop()
                    yield name, self._other_faults[name]
                if sum(self.kills.values()) >= kills:
                    return

    def play(self, kills: int) -> None:
        for number, (name, inject) in enumerate(self.schedule(kills)):
            self.random = self._kills.random = Random(f"{self._seed}/{number}")
            self.stack.start()
            outcome = inject()
            self.faults[name] += bool(outcome.get("done", True))
            self.log.write("fault", name=name, **outcome)
            if name == "kill up":
                # While everything starts again, most faults would have no effect.
                self.stack.wait_until_ready()
            self._pause(self.random.uniform(0.1, 1.0))

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.stack.start()
            time.sleep(0.05)

    # Frozen for a while

    def _freeze_worker(self) -> dict[str, Any]:
        workers = [process for role in ROLES for process in self.stack.processes().get(role, [])]
        if not workers:
            return {"done": False}
        worker = self.random.choice(workers)
        with frozen([worker]):
            self._pause(LEASE * self.random.uniform(1.5, 2.5))
        return {"pid": worker.pid}

    def _freeze_at_point(self) -> dict[str, Any]:
        point = self.random.choice([*WORKER_POINTS, RECONCILE])
        side = self.random.choice(("before", "after"))
        outcome = self._kills.at_point(ROLES, f"{point}|{side}", 0, signal.SIGSTOP)
        if outcome["done"]:
            self._pause(LEASE * self.random.uniform(1.5, 2.5))
            with suppress(ProcessLookupError):
                os.kill(outcome["pid"], signal.SIGCONT)
        return outcome

    def _freeze_trainer(self) -> dict[str, Any]:
        trainers = self.stack.processes().get("engine", [])
        with frozen(trainers):
            self._pause(self.random.uniform(1, 4))
        return {"done": bool(trainers)}

    def _stop_postgres(self) -> dict[str, Any]:
        servers = self.stack.processes().get("postgres", [])
        for server in servers:
            with suppress(psutil.NoSuchProcess):
                server.send_signal(signal.SIGQUIT)
        return {"done": bool(servers)}

    def _freeze_server(self, name: str, seconds: float) -> dict[str, Any]:
        processes = self.stack.servers(name)
        with frozen(processes):
            self._pause(seconds)
        return {"done": bool(processes), "seconds": seconds}

    # Messages

    def _empty_valkey(self) -> dict[str, Any]:
        try:
            with self.stack.redis() as client:
                client.flushall()
        except redis.RedisError as error:
            return {"done": False, "reason": type(error).__name__}
        return {}

    def _double_hints(self) -> dict[str, Any]:
        """Sends messages for jobs in every state, for each kind of work, twice."""
        jobs = [entry["job"] for entry in self.log.entries() if entry["kind"] == "accepted"]
        chosen = self.random.sample(jobs, min(len(jobs), 8)) + jobs[-3:]
        app = make_celery(f"redis+socket://{self.stack.home.run}/valkey/socket?virtual_host=0", name="chaos")
        try:
            for job_id in chosen * 2:
                for task in (Task.TRAIN, Task.PREPARE):
                    app.send_task(task.value, args=[job_id], retry=False)
        except (OperationalError, OSError) as error:
            return {"done": False, "reason": type(error).__name__}
        finally:
            app.close()
        return {"jobs": len(chosen)}

    def _shuffle_hints(self) -> dict[str, Any]:
        """Takes the messages out of the queues and puts two thirds of them back in another order."""
        moved = 0
        try:
            with self.stack.redis() as client:
                for queue in ("train", "prepare"):
                    with client.pipeline() as pipe:
                        messages = pipe.lrange(queue, 0, -1).delete(queue).execute()[0]
                    self.random.shuffle(messages)
                    returned = messages[: len(messages) * 2 // 3]
                    if returned:
                        client.rpush(queue, *returned)
                    moved += len(messages)
        except redis.RedisError as error:
            return {"done": False, "reason": type(error).__name__}
        return {"messages": moved}

    # Database connections, storage, clocks

    def _cut(self, when: str) -> dict[str, Any]:
        armed = self.stack.control / "commit.armed"
        write(armed, when)
        done = wait_until(lambda: not armed.exists(), seconds=PROMPT_SECONDS)
        armed.unlink(missing_ok=True)
        return {"done": done}

    def _fill_disk(self) -> dict[str, Any]:
        if not self.stack.has_small_storage:
            return {"done": False, "reason": "no file system can be mounted here"}
        filler = self.stack.home.artifacts / ".filler"
        try:
            with filler.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
        except OSError:
            pass  # closing the file writes the rest of its buffer
        self._pause(self.random.uniform(1.5, 4))
        filler.unlink()
        return {}

    def _step_clock(self) -> dict[str, Any]:
        """Shifts the wall clock of the service's processes by up to an hour; that of Postgres stays."""
        offset = self.random.uniform(-3600, 3600)
        write(self.stack.control / "clock", f"{offset:.3f}")
        return {"seconds": round(offset)}
