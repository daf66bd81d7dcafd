"""The page /metrics: metrics of this process, of the jobs in the database, and of each worker, from Redis.

Database and broker are queried at most every few seconds. One that does not answer is left out, and `heft_source_up`
is 0. Workers' metrics are parsed and get a `worker` label.
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


class MetricsPage:
    """Renders the page. `registry`: the metrics of this process."""

    def __init__(self, registry: CollectorRegistry, database: Database, redis: Redis) -> None:
        self._registry = registry
        self._database = database
        self._redis = redis
        self._lock = asyncio.Lock()
        self._external: Sequence[Metric] = ()
        self._fresh_until = 0.0

    async def render(self) -> bytes:
        """Returns Prometheus's text format."""
        async with self._lock:
            if time.monotonic() >= self._fresh_until:
                self._external = await self._query_sources()
                self._fresh_until = time.monotonic() + _FRESH_SECONDS
        families = _Families(merged([*self._registry.collect(), *self._external]))
        return generate_latest(cast(CollectorRegistry, families))

    async def _query_sources(self) -> list[Metric]:
        jobs, texts = await asyncio.gather(self._jobs(), self._workers())
        up = GaugeMetricFamily(
            "heft_source_up", "1 if the source answered the last query.", labels=["source"]
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
            log.warning("no metrics of jobs: %s", fault)
            return None

    async def _worker_keys(self) -> list[bytes]:
        keys = self._redis.scan_iter(f"{METRICS_PREFIX}*", count=1_000)
        return sorted([cast(bytes, key) async for key in keys])

    async def _workers(self) -> dict[str, str] | None:
        """Returns {worker id: its metrics as text}."""
        try:
            async with asyncio.timeout(_BROKER_SECONDS):
                keys = await self._worker_keys()
                texts = cast("list[bytes | None]", await self._redis.mget(keys) if keys else [])
        except (RedisError, OSError, TimeoutError) as fault:
            log.warning("no metrics of workers: %s", fault)
            return None
        return {
            key.decode().removeprefix(METRICS_PREFIX): text.decode()
            for key, text in zip(keys, texts, strict=True)
            if text is not None
        }


class _Families(Collector):
    """Metric families as a collector, which `generate_latest` takes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(families: Iterable[Metric]) -> list[Metric]:
    """Merges families by name. Drops families with another type than the first of their name."""
    by_name: dict[str, Metric] = {}
    for family in families:
        merged_family = by_name.get(family.name)
        if merged_family is None:
            merged_family = by_name[family.name] = Metric(family.name, family.documentation, family.type)
        if merged_family.type == family.type:
            merged_family.samples += family.samples
        else:
            log.warning("metric %s has two types, %s and %s", family.name, merged_family.type, family.type)
    return list(by_name.values())


def worker_families(worker: str, text: str) -> Iterator[Metric]:
    """Yields the families of a worker's text with a `worker` label; none if the text is malformed."""
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
            "Age of the oldest job waiting for a worker.",
            "state",
            jobs.waiting_seconds,
        ),
        (
            "heft_training_step_seconds",
            "Time of a training step, mean over running jobs.",
            "stage",
            jobs.step_seconds,
        ),
        (
            "heft_training_tokens_per_second",
            "Training tokens per second, sum over running jobs.",
            "stage",
            jobs.tokens_per_second,
        ),
    ):
        family = GaugeMetricFamily(name, text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        yield family
