"""The parts over HTTP: the whole service (`heft up`), compared with the library on the same rows, and overloaded."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import rows
from benchmarks.serving.library import questions, score, seconds
from cli.stack.home import Home
from cli.stack.up import running_stack
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.runtime.threads import run_in_short_lived_thread
from heft_engine.serving.batcher import Batcher


@dataclass(frozen=True)
class Stack:
    url: str
    key: str
    process: psutil.Process

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Resident memory of the API and of the inference worker."""
        by_process: dict[str, int] = {}
        for child in self.process.children(recursive=True):
            command = " ".join(child.cmdline())
            for name, words in (("api", "-m cli api"), ("inference", "inference")):
                if words in command:
                    by_process[name] = by_process.get(name, 0) + child.memory_info().rss
        return by_process


#: Above the 65 seconds that the service gives a trainer to write its checkpoint.
_STOP_SECONDS = 100.0


@contextmanager
def heft_up(model: str, **settings: str) -> Iterator[Stack]:
    """Runs `heft up` in a folder of its own during the `with` block, with `model` loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEFT_")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cli", "--home", folder, "up", "--port", "0"]
        process = subprocess.Popen(command, env=environment | settings, stdout=subprocess.DEVNULL)
        home = Home(path=Path(folder))
        try:
            end = time.monotonic() + 120
            while not _is_ready(home, model):
                if time.monotonic() > end or process.poll() is not None:
                    raise SystemExit("heft up did not start")
                time.sleep(0.2)
            record = running_stack(home)
            assert record is not None
            yield Stack(record.url, home.key_file.read_text().strip(), psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # its children end with it
                process.wait()


def _is_ready(home: Home, model: str) -> bool:
    record = running_stack(home)
    if record is None or not home.key_file.exists():
        return False
    question = {"model": model, "question": "is it ready"}
    headers = {"authorization": f"Bearer {home.key_file.read_text().strip()}"}
    try:
        answer = httpx.post(
            f"{record.url}/predict", json=question, headers=headers, timeout=60, trust_env=False
        )
    except httpx.TransportError:
        return False
    return answer.status_code == 200


def load(stack: Stack, options: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Runs the load generator."""
    command = [sys.executable, "-m", "benchmarks.serving.load", "--url", stack.url, "--key", stack.key]
    command += ["--model", options.model, "--data", str(options.data), "--rows", str(options.rows)]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def over_http(options: argparse.Namespace) -> dict[str, Any]:
    """Measures latencies and rows per second at 1, 8 and 64 clients, alternating with the library."""
    base = rows.base_model(options.model)
    variant = ModelVariant(lm=run_in_short_lived_thread(lambda: rows.packed_model(base)))
    examples = questions(options, base, options.rows)
    batcher = Batcher()
    score(batcher, variant, examples[:8])
    results: dict[str, Any] = {str(clients): {"latencies": [], "ratios": []} for clients in options.clients}
    single, library = [], []
    with heft_up(options.model, HEFT_PREFIX_CACHE_BYTES="0") as stack:
        load(stack, options, clients=8, requests=options.rows)
        for _ in range(options.repeat):
            single += [seconds(lambda e=e: score(batcher, variant, [e])) for e in examples]  # type: ignore[misc]
            library.append(seconds(lambda: score(batcher, variant, examples)))
            for clients in options.clients:
                # Enough requests that most batches are full; the first and the last are not.
                requests = max(options.rows * (1 if clients == 1 else 2), 4 * clients)
                result = load(stack, options, clients=clients, requests=requests)
                library.append(seconds(lambda: score(batcher, variant, examples)))
                # The mean of before and after, since the machine's speed varies.
                library_seconds = sum(library[-2:]) / 2 / options.rows
                results[str(clients)]["latencies"] += result["latencies"]
                results[str(clients)]["ratios"].append(library_seconds / (result["seconds"] / requests))
    batcher.close()
    return {
        "kind": "http",
        "rows": options.rows,
        "library_rows_per_second": options.rows / statistics.median(library),
        "library_single": statistics.median(single),
        "clients": {
            clients: {
                "milliseconds": _percentiles(result["latencies"]),
                "rows_per_second_over_library": result["ratios"],
            }
            for clients, result in results.items()
        },
        "added_milliseconds": 1_000
        * (statistics.median(results[str(options.clients[0])]["latencies"]) - statistics.median(single)),
    }


def overload(options: argparse.Namespace) -> dict[str, Any]:
    """Sends requests at twice the capacity for minutes."""
    with heft_up(options.model) as stack:
        load(stack, options, clients=8, requests=options.rows)
        saturated = load(stack, options, clients=64, requests=4 * options.rows)
        capacity = 4 * options.rows / saturated["seconds"]
        memory = [stack.resident_bytes]
        results = []
        for _ in range(4):
            result = load(stack, options, rate=2 * capacity, seconds=options.seconds / 4)
            results.append(result)
            memory.append(stack.resident_bytes)
        after = load(stack, options, clients=1, requests=8)
    statuses: dict[str, int] = {}
    for result in results:
        for status, count in result["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    return {
        "kind": "overload",
        "seconds": options.seconds,
        "capacity": capacity,
        "rate": 2 * capacity,
        "statuses": statuses,
        "bare_refusals": sum(result["bare_refusals"] for result in results),
        "milliseconds": _percentiles([latency for r in results for latency in r["latencies"]]),
        "memory_bytes": memory,
        "statuses_after": after["statuses"],
        "milliseconds_after": _percentiles(after["latencies"]),
    }


def _percentiles(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    return {
        f"p{percent}": 1_000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
        for percent in (50, 90, 99)
    }
