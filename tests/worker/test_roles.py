"""The process of each role: its chores, and its memory allocator."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from worker_bench import Bench

from worker import __main__ as process
from worker.celery_app import Role, worker_app


class Started(Exception):
    pass


@pytest.mark.parametrize("role", Role)
def test_only_the_inference_worker_retains_freed_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    configured: list[Role] = []

    def start(*_: Any) -> None:
        raise Started

    monkeypatch.setattr(process, "retain_freed_memory", lambda: configured.append(role))
    monkeypatch.setattr(process, "_context", start)
    with pytest.raises(Started):
        process.run(role, bench.context.settings)
    assert configured == ([role] if role is Role.INFERENCE else [])


@pytest.mark.parametrize(
    ("role", "chores"),
    [
        (Role.TRAIN, {"offer base models", "expire activations"}),
        (Role.INFERENCE, {"evict deleted models", "trim memory"}),
    ],
)
def test_chores(bench: Bench, role: Role, chores: set[str]) -> None:
    with ExitStack() as stack:
        app = worker_app(bench.context.settings.redis_url, role)
        registered = process._register(app, role, bench.context, stack)
        assert chores <= {chore.name for chore in registered}
