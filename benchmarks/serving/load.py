"""A load generator, in a process of its own: closed loop (a number of clients) or open loop (requests per second).

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp


def bodies(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in options.data.read_text().splitlines()[: options.rows]]
    return [{"model": options.model, **{k: row[k] for k in ("question", "passage")}} for row in rows]


class Load:
    """Sends requests and records their statuses and latencies."""

    def __init__(self, client: aiohttp.ClientSession, bodies: list[dict[str, Any]]) -> None:
        self._client = client
        self._bodies = bodies
        self._next = 0
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.without_retry_after = 0  #: refused requests

    async def send(self) -> None:
        body = self._bodies[self._next % len(self._bodies)]
        self._next += 1
        started_at = time.perf_counter()
        try:
            async with self._client.post("/predict", json=body) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError) as fault:
            self.statuses[type(fault).__name__] += 1
            return
        self.statuses[str(response.status)] += 1
        if response.status == 200:
            self.latencies.append(time.perf_counter() - started_at)
        elif "Retry-After" not in response.headers:
            self.without_retry_after += 1

    async def closed_loop(self, clients: int, requests: int) -> None:
        """Sends a number of requests from clients that each wait for their response."""
        remaining = iter(range(requests))

        async def client() -> None:
            for _ in remaining:
                await self.send()

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open_loop(self, rate: float, seconds: float) -> None:
        """Sends requests at a rate (per second), whether or not they are answered."""
        started_at, sent, tasks = time.perf_counter(), 0, set[asyncio.Task[None]]()
        while (elapsed := time.perf_counter() - started_at) < seconds:
            while sent < elapsed * rate:
                task = asyncio.create_task(self.send())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)


async def main(options: argparse.Namespace) -> dict[str, Any]:
    # Not httpx, whose pool scans all connections for every request: a thousand waiting ones took a whole core.
    async with aiohttp.ClientSession(
        options.url,
        headers={"authorization": f"Bearer {options.key}"},
        timeout=aiohttp.ClientTimeout(total=120),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5),
    ) as client:
        load = Load(client, bodies(options))
        await load.send()  # a warm-up
        load.latencies.clear()
        load.statuses.clear()
        started_at = time.perf_counter()
        if options.rate:
            await load.open_loop(options.rate, options.seconds)
        else:
            await load.closed_loop(options.clients, options.requests)
        return {
            "seconds": time.perf_counter() - started_at,
            "latencies": load.latencies,
            "statuses": dict(load.statuses),
            "bare_refusals": load.without_retry_after,
        }


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.serving.load", description=__doc__)
    top.add_argument("--url", required=True)
    top.add_argument("--key", required=True)
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--data", type=Path, required=True)
    top.add_argument("--rows", type=int, default=64)
    top.add_argument("--clients", type=int, default=1)
    top.add_argument("--requests", type=int, default=64)
    top.add_argument("--rate", type=float, default=0.0, help="requests per second of an open loop")
    top.add_argument("--seconds", type=float, default=60.0)
    return top


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(parser().parse_args()))))
