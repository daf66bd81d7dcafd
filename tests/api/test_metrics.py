"""/metrics: counters of all processes, merged, and available without database and broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
import redis
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Scope
from stub_worker import StubWorker, answered

from api.app import create_app
from api.door.addresses import is_local
from store import models
from store.db.session import SessionFactory, transaction
from store.jobs import jobs
from store.jobs.spec import TrainingSpec
from store.messages.broker import METRICS_SECONDS, metrics_key, redis_py_url
from store.settings import StoreSettings

Serving = Callable[[FastAPI], AbstractContextManager[str]]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
MODEL = "tiny"


def scraped(url: str) -> Samples:
    answer = httpx.get(f"{url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def fresh(settings: StoreSettings, serving: Serving) -> Iterator[str]:
    """A new API process, whose counters are zero."""
    with serving(create_app(settings)) as url:
        yield url


def test_requests_are_counted_by_route_and_status(
    fresh: str, client: httpx.Client, settings: StoreSettings, sessions: SessionFactory
) -> None:
    with transaction(sessions) as session:
        models.offer_base(session, model_id=MODEL, source="directory", info={})
    with (
        StubWorker(settings.redis_url) as worker,
        httpx.Client(base_url=fresh, headers=client.headers) as mine,
    ):
        worker.behaviour = answered
        for _ in range(2):
            assert mine.post("/predict", json={"model": MODEL, "question": "q"}).status_code == 200
        worker.behaviour = lambda _: None
        assert mine.post("/predict", json={"model": MODEL, "question": "q"}, timeout=9).status_code == 503
        for model in ("one", "two"):
            mine.get(f"/v1/models/{model}")
            mine.request("PROPFIND", f"/{model}")
    samples = scraped(fresh)
    name = "heft_http_requests_total"
    assert value(samples, name, method="POST", route="/predict", status="200") == 2
    assert value(samples, name, method="GET", route="/v1/models/{model_id:path}", status="404") == 2
    assert value(samples, name, method="any", route="unmatched", status="404") == 2
    assert value(samples, "heft_http_requests_in_flight") == 1, "this one"
    assert value(samples, "heft_predict_duration_seconds_count") == 2
    assert 0 < (value(samples, "heft_predict_duration_seconds_sum") or 0) < 5
    assert value(samples, "heft_predict_refused_total", status="503") == 1
    assert value(samples, "heft_predict_refused_total", status="429") == 0
    assert value(samples, "heft_predict_waiting_rows") == 0
    assert (value(samples, "process_resident_memory_bytes") or 0) > 1e7


def test_the_page_has_metrics_of_jobs_and_workers(
    fresh: str, settings: StoreSettings, sessions: SessionFactory
) -> None:
    spec = TrainingSpec(model=MODEL, training_file="sample:passages", seed=1)
    with transaction(sessions) as session:
        jobs.create(session, owner_id="someone", spec=spec)
    count = "# TYPE heft_tokens counter\nheft_tokens_total {}\n"
    with redis.Redis.from_url(redis_py_url(settings.redis_url)) as connection:
        for worker, text in (("a", count.format(3)), ("b", count.format(4)), ("c", "no { metric")):
            connection.set(metrics_key(worker), text, ex=METRICS_SECONDS)
        samples = scraped(fresh)
        connection.delete(*map(metrics_key, "abc"))
    assert [value(samples, "heft_tokens_total", worker=worker) for worker in "abc"] == [3, 4, None]
    assert (value(samples, "heft_jobs", state="validating_files") or 0) >= 1
    assert value(samples, "heft_jobs", state="running") == 0
    assert (value(samples, "heft_jobs_oldest_waiting_seconds", state="validating_files") or 0) > 0
    assert [value(samples, "heft_source_up", source=source) for source in ("database", "broker")] == [1, 1]
    text = httpx.get(f"{fresh}/metrics").text
    assert text.count("# TYPE heft_tokens_total counter") == 1, "one family, whoever counts"


def test_the_page_works_without_database_and_broker(settings: StoreSettings, serving: Serving) -> None:
    nowhere = settings.model_copy(
        update={
            "database_url": "postgresql+psycopg://u@127.0.0.1:1/none",
            "redis_url": "redis://127.0.0.1:1/0",
        }
    )
    with serving(create_app(nowhere)) as url:
        httpx.get(f"{url}/healthz")
        started = time.monotonic()
        samples = scraped(url)
        assert time.monotonic() - started < 8
        assert [value(samples, "heft_source_up", source=source) for source in ("database", "broker")] == [
            0,
            0,
        ]
        assert value(samples, "heft_http_requests_total", method="GET", route="/healthz", status="200") == 1


def request(host: str | None, **headers: str) -> Scope:
    raw_headers = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    client = None if host is None else (host, 1_234)
    return {"type": "http", "client": client, "headers": raw_headers}


def test_a_caller_from_elsewhere_needs_a_key(url: str, client: httpx.Client) -> None:
    forwarded = {"X-Forwarded-For": "203.0.113.9"}
    assert httpx.get(f"{url}/metrics", headers=forwarded).status_code == 401
    assert client.get("/metrics", headers=forwarded).status_code == 200
    for local in (request("127.0.0.1"), request("127.8.9.1"), request("::1")):
        assert is_local(local)
    for other in (
        request("203.0.113.9"),
        request(None),
        request("testclient"),
        request("127.0.0.1", forwarded="for=203.0.113.9"),
        request("127.0.0.1", x_real_ip="203.0.113.9"),
    ):
        assert not is_local(other)
