"""Measures recovery times and the latency during outages: `make chaos-figures`.

The stack has the service's own leases and sweep intervals (a minute) unless `--quick` is given. One line of JSON is
appended to `--results`. The promised times are in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import ledger
import psutil
from clients.client_log import ClientLog
from clients.jobs import fake_job
from clients.user import ENDED, JOBS, Client
from faults.freeze import frozen
from harness.chaos_stack import LEASE, QUICK_SETTINGS, ROLES, ChaosStack

from cli.stack.process import wait_until

RESULTS = ledger.FOLDER / "figures.jsonl"
_POSTS = 200
_TIMEOUT = 300.0


class Bench:
    """A running stack and one client."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.stack = ChaosStack(settings=settings)
        self.log = ClientLog(self.stack.folder / "client.jsonl")
        self.client = Client(self.stack.url, self.stack.key, self.log)
        self.random = Random(1)
        self.count = 0

    def until(self) -> float:
        return time.monotonic() + _TIMEOUT

    def body(self, **changes: Any) -> dict[str, Any]:
        """Uploads the rows of a job of many slow steps and returns the body of its request."""
        self.count += 1
        job = fake_job(self.random, f"figure-{self.count}")
        rows = {
            **json.loads(job.rows)["fake_trainer"],
            "dies": False,
            "bad": False,
            "steps": 2_000,
            "step_seconds": 0.1,
        }
        content = json.dumps({"fake_trainer": rows | changes}).encode()
        answer = self.client.request(
            "POST",
            "/v1/files",
            until=self.until(),
            data={"purpose": "fine-tune"},
            files={"file": ("r", content)},
        )
        return {**job.body, "training_file": answer.json()["id"]}

    def running(self) -> str:
        """Creates a job and waits until it has saved a checkpoint; returns its id."""
        answer = self.client.request("POST", JOBS, until=self.until(), json=self.body())
        job_id = str(answer.json()["id"])
        self.wait(lambda: self.step(job_id) > 4)
        return job_id

    def step(self, job_id: str) -> int:
        return int(self.client.get_job(job_id, self.until())["progress"].get("step") or 0)

    def attempts(self, job_id: str) -> int:
        answer = self.client.request(
            "GET", f"{JOBS}/{job_id}/events", until=self.until(), params={"limit": 100}
        )
        return sum(event["data"]["code"] == "STARTED" for event in answer.json()["data"])

    def cancel(self, job_id: str) -> None:
        self.client.request("POST", f"{JOBS}/{job_id}/cancel", until=self.until())
        self.wait(lambda: self.client.get_job(job_id, self.until())["status"] in ENDED)

    def wait(self, condition: Callable[[], bool]) -> float:
        """Waits for a condition; returns the seconds that it took."""
        started = time.monotonic()
        if not wait_until(condition, seconds=_TIMEOUT):
            raise AssertionError("it did not happen in time")
        return time.monotonic() - started

    def close(self) -> None:
        self.client.close()
        self.log.close()
        self.stack.close()


def death_of_worker(bench: Bench, *, machine: bool) -> float:
    """Returns the seconds from a worker's death until its job trains again.

    machine: the worker does not come back, so that its lease has to expire and another takes over. Otherwise it is
    restarted and takes its job back.
    """
    job_id = bench.running()
    before = bench.attempts(job_id)
    processes = bench.stack.processes()
    [trainer] = processes["engine"]
    holder = next(
        process for role in ROLES for process in processes.get(role, []) if trainer.ppid() == process.pid
    )
    if machine:
        # Frozen instead of killed: its successor must find its slot taken.
        holder.suspend()
    trainer.kill()
    if not machine:
        holder.kill()
    seconds = bench.wait(lambda: bench.attempts(job_id) > before)
    if machine:
        holder.resume()
    bench.cancel(job_id)
    return seconds


def cancel_of_running(bench: Bench) -> float:
    """Returns the seconds from the request until no process of the job is left."""
    job_id = bench.running()
    processes = bench.stack.processes()["engine"]
    started = time.monotonic()
    bench.client.request("POST", f"{JOBS}/{job_id}/cancel", until=bench.until())
    psutil.wait_procs(processes, timeout=_TIMEOUT)
    seconds = time.monotonic() - started
    bench.wait(lambda: bench.client.get_job(job_id, bench.until())["status"] in ENDED)
    return seconds


def posts_without_broker(bench: Bench, *, frozen: bool) -> dict[str, Any]:
    """Creates `_POSTS` jobs while the broker is killed again and again, or frozen."""
    body = bench.body(steps=6)
    answers, seconds = [], []
    servers = bench.stack.servers("valkey")
    with frozen(servers if frozen else []):
        for _ in range(_POSTS):
            if not frozen:
                for server in bench.stack.processes().get("valkey", []):
                    server.kill()
            started = time.monotonic()
            answer = bench.client.send("POST", JOBS, json=body)
            seconds.append(time.monotonic() - started)
            answers.append(0 if answer is None else answer.status_code)
    for job in bench.client.request("GET", JOBS, until=bench.until(), params={"limit": 100}).json()["data"]:
        if job["status"] not in ENDED:
            bench.client.request("POST", f"{JOBS}/{job['id']}/cancel", until=bench.until())
    return {
        "answered": sum(status == 200 for status in answers) / _POSTS,
        "p50_ms": round(1000 * statistics.median(seconds), 1),
        "p99_ms": round(1000 * statistics.quantiles(seconds, n=100)[98], 1),
    }


def api_without_postgres(bench: Bench, seconds: float) -> dict[str, Any]:
    """Returns the API's answers while Postgres is frozen, and the seconds until it answers normally afterwards."""
    body = bench.body(steps=6)
    statuses: dict[str, int] = {}
    slowest = 0.0
    with frozen(bench.stack.servers("postgres")):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for method, path, options in (("GET", JOBS, {}), ("POST", JOBS, {"json": body})):
                started = time.monotonic()
                answer = bench.client.send(method, path, **options)
                slowest = max(slowest, time.monotonic() - started)
                status = "none" if answer is None else f"{answer.status_code}"
                if answer is not None and "retry-after" in answer.headers:
                    status += " with Retry-After"
                statuses[status] = statuses.get(status, 0) + 1

    def answers_again() -> bool:
        answer = bench.client.send("GET", JOBS)
        return answer is not None and answer.status_code == 200

    return {
        "answers": statuses,
        "slowest_s": round(slowest, 2),
        "well_after_s": round(bench.wait(answers_again), 2),
    }


#: The measurements by name, as functions of the bench, the number of repeats, and whether settings are quick.
FIGURES: dict[str, Callable[[Bench, int, bool], Any]] = {
    "worker_killed_running_again_s": lambda bench, repeats, _: _several(
        repeats, lambda: death_of_worker(bench, machine=False)
    ),
    "worker_gone_running_again_s": lambda bench, repeats, _: _several(
        repeats, lambda: death_of_worker(bench, machine=True)
    ),
    "cancel_processes_gone_s": lambda bench, repeats, _: _several(repeats, lambda: cancel_of_running(bench)),
    "posts_broker_frozen": lambda bench, *_: posts_without_broker(bench, frozen=True),
    "posts_broker_killed": lambda bench, *_: posts_without_broker(bench, frozen=False),
    "postgres_frozen": lambda bench, _, quick: api_without_postgres(bench, 10.0 if quick else 30.0),
}


def measure(names: list[str], *, quick: bool, repeats: int) -> dict[str, Any]:
    bench = Bench(QUICK_SETTINGS if quick else {"HEFT_CHECKPOINT_SECONDS": "0.5"})
    try:
        bench.stack.wait_until_ready()
        return {
            **ledger.stamp(),
            "settings": "of the campaign" if quick else "of the service",
            "lease_s": LEASE if quick else 60.0,
            **{name: FIGURES[name](bench, repeats, quick) for name in names},
        }
    finally:
        bench.close()


def _several(repeats: int, once: Callable[[], float]) -> dict[str, float]:
    seconds = [once() for _ in range(repeats)]
    return {"n": repeats, "median": round(statistics.median(seconds), 1), "longest": round(max(seconds), 1)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="use the campaign's short leases")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = measure(options.only, quick=options.quick, repeats=options.repeats)
    ledger.add(options.results, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
