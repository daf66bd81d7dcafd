"""Metrics of a worker process, as Prometheus's text in Redis: the API adds it to its own /metrics.

The text expires with its worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from redis.exceptions import RedisError

from store.errors import Unavailable
from store.messages.broker import METRICS_SECONDS, connect_redis, metrics_key
from worker.context import Context

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_POWERS = tuple(2**n for n in range(11))
_TOKENS = tuple(2**n for n in range(5, 18))


def worker_registry(role: str) -> CollectorRegistry:
    """A registry with the metrics of every worker: that it runs, and its process's resources."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    info = Gauge("heft_worker_info", "1: this worker is there.", ["role", "version"], registry=registry)
    info.labels(role, version("heft-service")).set(1)
    return registry


class InferenceMetrics:
    """The metrics of an inference worker. Safe to use from many threads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        histogram = partial(Histogram, registry=registry)
        latency = partial(histogram, buckets=_LATENCIES)
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        self._answered = latency(
            "heft_inference_duration_seconds", "Requests answered, from the moment that a worker took them."
        )
        self._queued = latency(
            "heft_inference_queue_seconds", "From the API's sending of a request until its work began."
        )
        self._abandoned = counter(
            "heft_inference_dropped", "Requests that nobody waited for any more: too late, or cancelled."
        )
        self._waited = latency("heft_batch_wait_seconds", "A row's wait for room in a forward pass.")
        self._batch_rows = histogram("heft_batch_rows", "Rows of one forward pass.", buckets=_POWERS)
        self._batch_tokens = histogram("heft_batch_tokens", "Tokens of one forward pass.", buckets=_TOKENS)
        self._batch_seconds = latency("heft_batch_duration_seconds", "Time of one forward pass.")
        self._tokens = counter("heft_tokens", "Tokens that ran.")
        self._prefix = counter(
            "heft_prefix_tokens", "Prompt tokens looked up in the prefix cache.", ["result"]
        )
        self._models = gauge("heft_models_held", "Models in memory.", ["kind"])
        self._bytes = gauge("heft_models_held_bytes", "Memory of the models held.", ["kind"])

    def on_started(self, seconds: float) -> None:
        """Observes the time from the API's sending of a request to the start of its work."""
        self._queued.observe(max(0.0, seconds))  # clocks of two machines

    def on_answered(self, seconds: float) -> None:
        """Observes the time from a request's arrival at the worker to its end."""
        self._answered.observe(seconds)

    def on_abandoned(self) -> None:
        """Counts a request whose client has gone or whose deadline has passed."""
        self._abandoned.inc()

    def on_pass(
        self, *, rows: int, tokens: int, cached_tokens: int, seconds: float, waits: Sequence[float]
    ) -> None:
        """Counts a scoring pass (heft_engine.serving.batcher.Observer)."""
        self._batch_rows.observe(rows)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)
        self._tokens.inc(tokens)
        self._prefix.labels("hit").inc(cached_tokens)
        self._prefix.labels("miss").inc(tokens)
        for wait in waits:
            self._waited.observe(wait)

    def on_usage(self, kind: str, count: int, bytes: int) -> None:
        """Sets the number and bytes of the loaded models of one kind: `merged`, `shared` or `base`."""
        self._models.labels(kind).set(count)
        self._bytes.labels(kind).set(bytes)


class Publisher:
    """Writes a registry's text to Redis, under the worker's id. `refresh` is called before each write."""

    def __init__(
        self, context: Context, registry: CollectorRegistry, refresh: Callable[[], None] = lambda: None
    ) -> None:
        self._key = metrics_key(context.worker_id)
        self._registry = registry
        self._refresh = refresh
        self._redis = connect_redis(context.settings.redis_url)

    def publish(self) -> None:
        """Writes the metrics now. Raises Unavailable."""
        self._refresh()
        try:
            self._redis.set(self._key, generate_latest(self._registry), ex=METRICS_SECONDS)
        except RedisError as error:
            raise Unavailable(f"the broker does not accept this worker's metrics: {error}") from error

    def close(self) -> None:
        self._redis.close()
