"""/metrics put together: this process's own, what the database says of jobs, what each worker has put into Redis.

Database and broker are asked at most every few seconds; one that is away is left out, and `heft_source_up` says so. It
does NOT know what workers count: their text is parsed and gets a `worker` label.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api.database import Database
from store.errors import Unavailable
from store.messages.broker import METRICS_PREFIX
from store.ops import job_statistics

log = logging.getLogger(__name__)

_FRESH_SECONDS = 5.0
_BROKER_SECONDS = 2.0


class Scrape:
    """`await scrape()` → the exposition text."""

    def __init__(self, own: CollectorRegistry, database: Database, redis: Redis) -> None:
        self._own = own
        self._database = database
        self._redis = redis
        self._lock = asyncio.Lock()
        self._elsewhere: Sequence[Metric] = ()
        self._until = 0.0

    async def __call__(self) -> bytes:
        async with self._lock:
            if time.monotonic() >= self._until:
                self._elsewhere = await self._ask()
                self._until = time.monotonic() + _FRESH_SECONDS
        everything = _Everything(merged([*self._own.collect(), *self._elsewhere]))
        return generate_latest(cast(CollectorRegistry, everything))

    async def _ask(self) -> list[Metric]:
        jobs, texts = await asyncio.gather(self._jobs(), self._workers())
        up = GaugeMetricFamily(
            "heft_source_up", "1 where the last scrape got an answer from it.", labels=["source"]
        )
        up.add_metric(["database"], float(jobs is not None))
        up.add_metric(["broker"], float(texts is not None))
        of_workers = [
            family for worker, text in (texts or {}).items() for family in worker_families(worker, text)
        ]
        return [up, *(job_families(jobs) if jobs is not None else ()), *of_workers]

    async def _jobs(self) -> job_statistics.JobStatistics | None:
        try:
            return await self._database(job_statistics.jobs)
        except Unavailable as fault:
            log.warning("metrics without those of jobs: %s", fault)
            return None

    async def _worker_keys(self) -> list[bytes]:
        found = self._redis.scan_iter(f"{METRICS_PREFIX}*", count=1_000)
        return sorted([cast(bytes, key) async for key in found])

    async def _workers(self) -> dict[str, str] | None:
        """{worker id: its exposition text}."""
        try:
            async with asyncio.timeout(_BROKER_SECONDS):
                keys = await self._worker_keys()
                texts = cast("list[bytes | None]", await self._redis.mget(keys) if keys else [])
        except (RedisError, OSError, TimeoutError) as fault:
            log.warning("metrics without those of workers: %s", fault)
            return None
        return {
            key.decode().removeprefix(METRICS_PREFIX): text.decode()
            for key, text in zip(keys, texts, strict=True)
            if text is not None
        }


class _Everything(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(families: Iterable[Metric]) -> list[Metric]:
    """One family for each name. Of two that call different things by one name, the first stays."""
    found: dict[str, Metric] = {}
    for family in families:
        into = found.get(family.name)
        if into is None:
            into = found[family.name] = Metric(family.name, family.documentation, family.type)
        if into.type == family.type:
            into.samples += family.samples
        else:
            log.warning("metric %s is both %s and %s", family.name, into.type, family.type)
    return list(found.values())


def worker_families(worker: str, text: str) -> Iterator[Metric]:
    """What one worker has put into Redis, every sample with its name; nothing where that can't be read."""
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError as fault:
        log.warning("the metrics of worker %s can't be read: %s", worker, fault)
        return
    for family in families:
        family.samples = [
            sample._replace(labels={**sample.labels, "worker": worker}) for sample in family.samples
        ]
        yield family


def job_families(jobs: job_statistics.JobStatistics) -> Iterator[Metric]:
    for name, text, label, values in (
        ("heft_jobs", "Fine-tuning jobs.", "state", jobs.by_state),
        (
            "heft_jobs_oldest_waiting_seconds",
            "Age of the oldest job that waits for a worker.",
            "state",
            jobs.waiting_seconds,
        ),
        (
            "heft_training_step_seconds",
            "Time of a training step, mean over the jobs that run.",
            "stage",
            jobs.step_seconds,
        ),
        (
            "heft_training_tokens_per_second",
            "Tokens trained on a second, of all jobs that run.",
            "stage",
            jobs.tokens_per_second,
        ),
    ):
        family = GaugeMetricFamily(name, text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        yield family
