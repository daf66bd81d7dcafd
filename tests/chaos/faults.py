"""What is done to the stack, and in what order: a schedule drawn from a seed, one fault after the other.

A seed gives the same schedule again: the same faults, places and pauses. What each meets depends on the machine.
It does NOT look at what comes of it: `verdict` does.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import redis
from chaos_stack import LEASE, ROLES, ChaosStack
from evidence import Evidence
from kombu.exceptions import OperationalError

from cli.process import wait_until
from store.queue import Task, make_celery

#: Kinds of process that are killed, each as often as the others. The supervisor of a job is its worker; the reconciler
#: is a thread of every worker, killed while it holds its lock.
KILLED = ("api", "worker", "prepare", "trainer", "reconciler", "postgres", "valkey", "up")
#: What a worker's process is killed at.
_WORKER_POINTS = (
    "commit claim", "commit finish_prepared", "commit finish_succeeded", "commit finish_cancelled",
    "commit finish_paused", "commit record_event", "commit record_checkpoint", "commit release",
    "commit trainer_died", "commit worker.attempt._claim", "commit worker.attempt.ask", "commit worker.presence",
    "commit worker.export", "publish heft.train", "publish heft.prepare", "publish heft.export",
    "rename store.storing", "fsync store.storing", "commit", "publish", "rename", "fsync",
)  # fmt: skip
_API_POINTS = ("commit _create", "commit _record", "commit request_cancel", "commit request_pause", "commit resume",
               "publish heft.prepare", "rename store.storing", "fsync store.storing", "commit", "publish")  # fmt: skip
_TRAINER_POINTS = ("rename", "fsync")
_SWEEP = "commit worker.sweep.sweep"
_PROMPT_SECONDS = 6.0


class Injector:
    """Does one fault after the other. `kills` and `faults` count what was really done."""

    def __init__(self, stack: ChaosStack, log: Evidence, seed: int, *, others: float = 0.5) -> None:
        self.stack, self.log = stack, log
        self.random = Random(seed)
        self._others_share = others
        self.kills: Counter[str] = Counter()
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
            "checkpoint damaged": self._damage_checkpoint,
            "disk full": self._fill_disk,
            "clock stepped": self._step_clock,
        }

    def schedule(self, kills: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Faults until there were as many kills; every kind of kill in its turn, in an order of its own each round."""
        others: list[str] = []
        while sum(self.kills.values()) < kills:
            for kind in self.random.sample(KILLED, len(KILLED)):
                yield f"kill {kind}", lambda kind=kind: self._kill(kind)
                if self.random.random() < self._others_share:
                    others = others or self.random.sample(list(self._stand_still), len(self._stand_still))
                    name = others.pop()
                    yield name, self._stand_still[name]
                if sum(self.kills.values()) >= kills:
                    return

    def play(self, kills: int) -> None:
        for name, do in self.schedule(kills):
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

    # Kills

    def _kill(self, kind: str) -> dict[str, Any]:
        at_point = self.random.random() < 0.5
        pick = self.random.random()
        if kind == "reconciler":
            done = self._kill_at(ROLES, _SWEEP, "before", 0)
        elif kind in ("postgres", "valkey", "up"):
            done = self._kill_now(kind, pick)
        elif at_point:
            points = {"api": _API_POINTS, "trainer": _TRAINER_POINTS}.get(kind, _WORKER_POINTS)
            roles = {"worker": ("train", "train-2"), "trainer": ("engine",)}.get(kind, (kind,))
            side = self.random.choice(("before", "after"))
            point = points[int(pick * len(points))]
            done = self._kill_at(roles, point, side, self.random.randrange(4))
            if not done["done"]:
                done |= self._kill_now(kind, pick)
        else:
            done = self._kill_now(kind, pick)
        self.kills[kind] += bool(done["done"])
        return done

    def _kill_now(self, kind: str, pick: float) -> dict[str, Any]:
        roles = {"worker": ("train", "train-2"), "trainer": ("engine",)}.get(kind, (kind,))
        targets: list[psutil.Process] = []

        def there() -> bool:
            self.stack.start()
            found = self.stack.look()
            targets[:] = [process for role in roles for process in found.get(role, [])]
            return bool(targets)

        if not wait_until(there, seconds=_PROMPT_SECONDS):
            return {"done": False, "reason": f"no {kind} lives"}
        if kind == "postgres" and pick < 0.3:
            # One of its processes: the server then restarts itself, and every connection is lost.
            with suppress(psutil.Error):
                targets = targets[0].children() or targets
        target = targets[int(pick * len(targets))]
        with suppress(psutil.NoSuchProcess):
            target.kill()
            return {"done": True, "at": "any time", "pid": target.pid}
        return {"done": False, "reason": "it was just gone"}

    def _kill_at(self, roles: tuple[str, ...], point: str, side: str, skip: int) -> dict[str, Any]:
        return self._at_point(roles, f"{point}|{side}", skip, signal.SIGKILL)

    def _at_point(
        self, roles: tuple[str, ...], point: str, skip: int, number: signal.Signals
    ) -> dict[str, Any]:
        """Have the first process of these roles that comes there do it to itself."""
        fired = self.stack.control / "fired.jsonl"
        before = fired.read_text().count("\n") if fired.exists() else 0
        name, _, side = point.partition("|")
        order = {"match": name, "side": side, "skip": skip, "signal": int(number), "n": self.random.random()}
        for role in roles:
            _write(self.stack.control / f"{role}.armed", json.dumps(order))

        def has_fired() -> bool:
            self.stack.start()
            return fired.exists() and fired.read_text().count("\n") > before

        done = wait_until(has_fired, seconds=_PROMPT_SECONDS)
        for role in roles:
            (self.stack.control / f"{role}.armed").unlink(missing_ok=True)
        # One may have taken the order at the last moment.
        done = done or has_fired()
        if not done:
            return {"done": False, "reason": f"nobody came to {point}"}
        return {"done": True, "at": "point", **json.loads(fired.read_text().splitlines()[before])}

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
        point = self.random.choice([*_WORKER_POINTS, _SWEEP])
        side = self.random.choice(("before", "after"))
        what = self._at_point(ROLES, f"{point}|{side}", 0, signal.SIGSTOP)
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
        _write(armed, when)
        done = wait_until(lambda: not armed.exists(), seconds=_PROMPT_SECONDS)
        armed.unlink(missing_ok=True)
        return {"done": done}

    def _damage_checkpoint(self) -> dict[str, Any]:
        """The newest ones, while their job still runs; then its trainer dies and it has to resume."""
        folders = list(self.stack.home.artifacts.glob("jobs/*/*/checkpoint-*-step"))
        damaged = []
        for folder in sorted(folders, key=_age)[:2]:
            files = [path for path in folder.rglob("*") if path.is_file()]
            if files:
                with suppress(OSError):
                    damaged.append(damage(self.random, self.random.choice(files)))
        for trainer in self.stack.look().get("engine", []):
            with suppress(psutil.NoSuchProcess):
                trainer.kill()
        return {"done": bool(damaged), "files": damaged}

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
        _write(self.stack.control / "clock", f"{offset:.3f}")
        return {"seconds": round(offset)}


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


class stopped:
    """SIGSTOP for as long as the body runs."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes

    def __enter__(self) -> None:
        self._send(signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".new")
    partial.write_text(text)
    partial.rename(path)
