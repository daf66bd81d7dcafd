"""Over HTTP: the real stack (`heft up`), asked by clients elsewhere, against the library on the same rows."""

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
from benchmarks.serving.library import questions, scored, seconds
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
        """Of the API and of the inference worker."""
        found: dict[str, int] = {}
        for child in self.process.children(recursive=True):
            command = " ".join(child.cmdline())
            for name, words in (("api", "-m cli api"), ("inference", "inference")):
                if words in command:
                    found[name] = found.get(name, 0) + child.memory_info().rss
        return found


#: A trainer writes a checkpoint before it goes, and the stack gives it 65 seconds.
_STOP_SECONDS = 100.0


@contextmanager
def heft_up(model: str, **settings: str) -> Iterator[Stack]:
    """`heft up` in a folder of its own, until the body ends; `model` can be asked when it begins."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEFT_")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cli", "--home", folder, "up", "--port", "0"]
        process = subprocess.Popen(command, env=environment | settings, stdout=subprocess.DEVNULL)
        home = Home(path=Path(folder))
        try:
            end = time.monotonic() + 120
            while not _is_ready(home, model):
                if time.monotonic() > end or process.poll() is not None:
                    raise SystemExit("heft up did not come up")
                time.sleep(0.2)
            record = running_stack(home)
            assert record is not None
            yield Stack(record.url, home.key_file.read_text().strip(), psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # what it has started goes with it
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


def load(stack: Stack, options: argparse.Namespace, **given: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.serving.load", "--url", stack.url, "--key", stack.key]
    command += ["--model", options.model, "--data", str(options.data), "--rows", str(options.rows)]
    for name, value in given.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def over_http(options: argparse.Namespace) -> dict[str, Any]:
    """Latencies and rows a second at 1, 8 and 64 clients, the library in between."""
    base = rows.base_model(options.model)
    weights = ModelVariant(lm=run_in_short_lived_thread(lambda: rows.packed_model(base)))
    examples = questions(options, base, options.rows)
    batcher = Batcher()
    scored(batcher, weights, examples[:8])
    found: dict[str, Any] = {str(clients): {"latencies": [], "ratios": []} for clients in options.clients}
    single, library = [], []
    with heft_up(options.model, HEFT_PREFIX_CACHE_BYTES="0") as stack:
        load(stack, options, clients=8, requests=options.rows)
        for _ in range(options.repeat):
            single += [seconds(lambda e=e: scored(batcher, weights, [e])) for e in examples]  # type: ignore[misc]
            library.append(seconds(lambda: scored(batcher, weights, examples)))
            for clients in options.clients:
                # The first pass and the last are not full: there must be others.
                requests = max(options.rows * (1 if clients == 1 else 2), 4 * clients)
                result = load(stack, options, clients=clients, requests=requests)
                library.append(seconds(lambda: scored(batcher, weights, examples)))
                # Before and after: the machine is not as fast in one minute as in the next.
                own = sum(library[-2:]) / 2 / options.rows
                found[str(clients)]["latencies"] += result["latencies"]
                found[str(clients)]["ratios"].append(own / (result["seconds"] / requests))
    batcher.close()
    return {
        "kind": "http",
        "rows": options.rows,
        "library_rows_per_second": options.rows / statistics.median(library),
        "library_single": statistics.median(single),
        "clients": {
            clients: {
                "milliseconds": _percentiles(one["latencies"]),
                "rows_per_second_over_library": one["ratios"],
            }
            for clients, one in found.items()
        },
        "added_milliseconds": 1_000
        * (statistics.median(found[str(options.clients[0])]["latencies"]) - statistics.median(single)),
    }


def overload(options: argparse.Namespace) -> dict[str, Any]:
    """Twice as many requests as can be answered, for minutes."""
    with heft_up(options.model) as stack:
        load(stack, options, clients=8, requests=options.rows)
        measured = load(stack, options, clients=64, requests=4 * options.rows)
        capacity = 4 * options.rows / measured["seconds"]
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


def _percentiles(found: list[float]) -> dict[str, float]:
    ordered = sorted(found)
    return {
        f"p{percent}": 1_000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
        for percent in (50, 90, 99)
    }
