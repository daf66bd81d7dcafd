"""A worker's metrics, and their way to the API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis
from worker_bench import Bench

from api.metrics import ApiMetrics
from store.errors import Unavailable
from store.messages.broker import METRICS_SECONDS, metrics_key, redis_py_url
from worker.inference.metrics import InferenceMetrics, Publisher, worker_registry


@pytest.fixture
def registry() -> CollectorRegistry:
    return worker_registry("inference")


@pytest.fixture
def publisher(bench: Bench, registry: CollectorRegistry) -> Iterator[Publisher]:
    publisher = Publisher(bench.context, registry)
    yield publisher
    publisher.close()


def test_what_is_observed_is_counted(registry: CollectorRegistry) -> None:
    metrics = InferenceMetrics(registry)
    metrics.on_pass(rows=3, tokens=100, cached_tokens=0, seconds=0.5, waits=[])
    metrics.on_pass(rows=5, tokens=200, cached_tokens=70, seconds=0.25, waits=[0.125])
    metrics.on_usage("shared", 2, 1_000)
    metrics.on_usage("shared", 1, 500)
    metrics.on_started(-0.5)
    metrics.on_answered(0.1)
    metrics.on_abandoned()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert (value("heft_batch_rows_sum"), value("heft_batch_rows_count")) == (8, 2)
    assert value("heft_batch_rows_bucket", le="4.0") == 1
    assert (value("heft_batch_tokens_sum"), value("heft_tokens_total")) == (300, 300)
    assert value("heft_batch_duration_seconds_sum") == 0.75
    assert value("heft_prefix_tokens_total", result="hit") == 70
    assert value("heft_prefix_tokens_total", result="miss") == 300
    assert value("heft_batch_wait_seconds_sum") == 0.125
    assert value("heft_models_held", kind="shared") == 1
    assert value("heft_models_held_bytes", kind="shared") == 500
    assert value("heft_inference_queue_seconds_sum") == 0
    assert value("heft_inference_duration_seconds_count") == 1
    assert value("heft_inference_dropped_total") == 1


def test_they_lie_in_redis_and_expire(bench: Bench, publisher: Publisher) -> None:
    publisher.publish()
    with Redis.from_url(redis_py_url(bench.context.settings.redis_url)) as redis:
        key = metrics_key("worker-1")
        assert b'heft_worker_info{role="inference"' in (redis.get(key) or b"")  # type: ignore[operator]
        assert 0 < redis.ttl(key) <= METRICS_SECONDS  # type: ignore[operator]


def test_a_broker_that_is_away_is_tried_again_later(bench: Bench, registry: CollectorRegistry) -> None:
    settings = bench.context.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    publisher = Publisher(replace(bench.context, settings=settings), registry)
    with pytest.raises(Unavailable):
        publisher.publish()
    publisher.close()


def test_every_metric_is_in_the_documentation(registry: CollectorRegistry) -> None:
    InferenceMetrics(registry)
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    for family in [*registry.collect(), *ApiMetrics().registry.collect()]:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}`" in page or name.startswith("process_"), name
