"""What is done to the stack, and in what order: a schedule drawn from a seed, one fault after the other.

A seed gives the same schedule again: the same faults, places and pauses. What each meets depends on the machine.
It does NOT look at what comes of it: `verdict` does.
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
from clients.evidence import Evidence
from faults.damage import damage_checkpoint
from faults.frozen import stopped
from faults.kills import KILLED, PROMPT_SECONDS, SWEEP, WORKER_POINTS, Kills, write
from faults.races import cancel_at_point
from harness.chaos_stack import LEASE, ROLES, ChaosStack
from kombu.exceptions import OperationalError

from cli.stack.process import wait_until
from store.messages.broker import Task, make_celery


class Injector:
    """Does one fault after the other. `kills` and `faults` count what was really done."""

    def __init__(self, stack: ChaosStack, log: Evidence, seed: int, *, others: float = 0.5) -> None:
        self.stack, self.log = stack, log
        self._seed = seed
        #: Of the fault that is done now: what it meets, and how it draws, must not move those that follow.
        self.random = Random(seed)
        self._order = Random(seed)
        self._others_share = others
        self._kills = Kills(stack, self.random)
        self.kills = self._kills.done
        self.faults: Counter[str] = Counter()
        self._stand_still: dict[str, Callable[[], dict[str, Any]]] = {
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
        """Faults until there were as many kills; every kind of kill in its turn, in an order of its own each round."""
        others: list[str] = []
        while sum(self.kills.values()) < kills:
            for kind in self._order.sample(KILLED, len(KILLED)):
                yield f"kill {kind}", lambda kind=kind: self._kills.kill(kind)
                if self._order.random() < self._others_share:
                    others = others or self._order.sample(list(self._stand_still), len(self._stand_still))
                    name = others.pop()
                    yield name, self._stand_still[name]
                if sum(self.kills.values()) >= kills:
                    return

    def play(self, kills: int) -> None:
        for number, (name, do) in enumerate(self.schedule(kills)):
            self.random = self._kills.random = Random(f"{self._seed}/{number}")
            self.stack.start()
            what = do()
            self.faults[name] += bool(what.get("done", True))
            self.log.write("fault", name=name, **what)
            if name == "kill up":
                # All of it starts anew; a fault in the middle of that is as good as none.
                self.stack.wait_until_ready()
            self._pause(self.random.uniform(0.1, 1.0))

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.stack.start()
            time.sleep(0.05)

    # Frozen for a while

    def _freeze_worker(self) -> dict[str, Any]:
        workers = [process for role in ROLES for process in self.stack.look().get(role, [])]
        if not workers:
            return {"done": False}
        worker = self.random.choice(workers)
        with stopped([worker]):
            self._pause(LEASE * self.random.uniform(1.5, 2.5))
        return {"pid": worker.pid}

    def _freeze_at_point(self) -> dict[str, Any]:
        point = self.random.choice([*WORKER_POINTS, SWEEP])
        side = self.random.choice(("before", "after"))
        what = self._kills.at_point(ROLES, f"{point}|{side}", 0, signal.SIGSTOP)
        if what["done"]:
            self._pause(LEASE * self.random.uniform(1.5, 2.5))
            with suppress(ProcessLookupError):
                os.kill(what["pid"], signal.SIGCONT)
        return what

    def _freeze_trainer(self) -> dict[str, Any]:
        trainers = self.stack.look().get("engine", [])
        with stopped(trainers):
            self._pause(self.random.uniform(1, 4))
        return {"done": bool(trainers)}

    def _stop_postgres(self) -> dict[str, Any]:
        servers = self.stack.look().get("postgres", [])
        for server in servers:
            with suppress(psutil.NoSuchProcess):
                server.send_signal(signal.SIGQUIT)
        return {"done": bool(servers)}

    def _freeze_server(self, name: str, seconds: float) -> dict[str, Any]:
        processes = self.stack.servers(name)
        with stopped(processes):
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
        """Messages for jobs in every state, for each kind of work, more than once."""
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
        """What waits in the queues is taken out; most of it is put back in another order."""
        moved = 0
        try:
            with self.stack.redis() as client:
                for queue in ("train", "prepare"):
                    with client.pipeline() as pipe:
                        messages = pipe.lrange(queue, 0, -1).delete(queue).execute()[0]
                    self.random.shuffle(messages)
                    kept = messages[: len(messages) * 2 // 3]
                    if kept:
                        client.rpush(queue, *kept)
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
            pass  # closing it writes what was left
        self._pause(self.random.uniform(1.5, 4))
        filler.unlink()
        return {}

    def _step_clock(self) -> dict[str, Any]:
        """The wall clock of every process of the service, by up to an hour either way; Postgres' own runs on."""
        offset = self.random.uniform(-3600, 3600)
        write(self.stack.control / "clock", f"{offset:.3f}")
        return {"seconds": round(offset)}
