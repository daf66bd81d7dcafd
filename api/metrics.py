"""Prometheus metrics of the API process. Labels are routes and statuses, never ids or owners."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from starlette.types import Scope

#: Seconds, from a request to an idle service to the default timeout of /predict.
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ApiMetrics:
    """The metrics of a process. Thread-safe."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "heft_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "heft_http_requests_in_flight", "HTTP requests under way.", registry=self.registry
        )
        self._predict_seconds = Histogram(
            "heft_predict_duration_seconds",
            "Answered /predict requests, from the first byte of the request to the last of the answer.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._refused = Counter(
            "heft_predict_refused",
            "/predict requests answered 429 or 503.",
            ["status"],
            registry=self.registry,
        )
        self._waiting = Gauge(
            "heft_predict_waiting_rows", "Inputs whose answers are awaited.", registry=self.registry
        )
        for status in ("429", "503"):
            self._refused.labels(status)

    def watch_waiting(self, rows: Callable[[], int]) -> None:
        """Sets the function that returns the number of waiting inputs."""
        self._waiting.set_function(rows)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Records a response; status 0: the connection broke before it. `scope`: of the request, after routing."""
        if status == 0:
            return
        route = getattr(scope.get("route"), "path", "unmatched")
        # Unknown methods share one series.
        method = scope["method"] if route != "unmatched" else "any"
        self._requests.labels(method, route, str(status)).inc()
        if not route.endswith("/predict"):
            return
        if status == 200:
            self._predict_seconds.observe(seconds)
        elif status in (429, 503):
            self._refused.labels(str(status)).inc()
