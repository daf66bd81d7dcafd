"""A load generator in a process of its own: so many clients that each ask again when they are answered, or so many
requests a second whatever becomes of them. One JSON object on stdout."""

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
    def __init__(self, client: aiohttp.ClientSession, asked: list[dict[str, Any]]) -> None:
        self._client = client
        self._asked = asked
        self._next = 0
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.bare_refusals = 0

    async def ask(self) -> None:
        body = self._asked[self._next % len(self._asked)]
        self._next += 1
        began = time.perf_counter()
        try:
            async with self._client.post("/predict", json=body) as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError) as fault:
            self.statuses[type(fault).__name__] += 1
            return
        self.statuses[str(answer.status)] += 1
        if answer.status == 200:
            self.latencies.append(time.perf_counter() - began)
        elif "Retry-After" not in answer.headers:
            self.bare_refusals += 1

    async def closed(self, clients: int, requests: int) -> None:
        left = iter(range(requests))

        async def one() -> None:
            for _ in left:
                await self.ask()

        await asyncio.gather(*(one() for _ in range(clients)))

    async def opened(self, rate: float, seconds: float) -> None:
        began, sent, under_way = time.perf_counter(), 0, set[asyncio.Task[None]]()
        while (passed := time.perf_counter() - began) < seconds:
            while sent < passed * rate:
                task = asyncio.create_task(self.ask())
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                sent += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*under_way)


async def main(options: argparse.Namespace) -> dict[str, Any]:
    # Not httpx: its pool looks at every connection for every request, and a thousand that wait took a whole core.
    async with aiohttp.ClientSession(
        options.url,
        headers={"authorization": f"Bearer {options.key}"},
        timeout=aiohttp.ClientTimeout(total=120),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5),
    ) as client:
        load = Load(client, bodies(options))
        await load.ask()
        load.latencies.clear()
        load.statuses.clear()
        began = time.perf_counter()
        if options.rate:
            await load.opened(options.rate, options.seconds)
        else:
            await load.closed(options.clients, options.requests)
        return {
            "seconds": time.perf_counter() - began,
            "latencies": load.latencies,
            "statuses": dict(load.statuses),
            "bare_refusals": load.bare_refusals,
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
    top.add_argument("--rate", type=float, default=0.0, help="requests a second, instead of clients")
    top.add_argument("--seconds", type=float, default=60.0)
    return top


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(parser().parse_args()))))
