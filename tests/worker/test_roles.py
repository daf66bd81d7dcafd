"""What each role's process is, beside the tasks that it runs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from worker_bench import Bench

from worker import __main__ as process
from worker.celery_app import Role, worker_app


class Begun(Exception):
    pass


@pytest.mark.parametrize("role", Role)
def test_only_who_answers_keeps_what_passes_free(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    kept: list[Role] = []

    def begin(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(process, "retain_freed_memory", lambda: kept.append(role))
    monkeypatch.setattr(process, "_context", begin)
    with pytest.raises(Begun):
        process.run(role, bench.context.settings)
    assert kept == ([role] if role is Role.INFERENCE else [])


@pytest.mark.parametrize(
    ("role", "chores"),
    [(Role.TRAIN, {"offers", "prefills"}), (Role.INFERENCE, {"forgetting", "memory"})],
)
def test_chores(bench: Bench, role: Role, chores: set[str]) -> None:
    with ExitStack() as stack:
        app = worker_app(bench.context.settings.redis_url, role)
        found = process._register(app, role, bench.context, stack)
        assert chores <= {chore.name for chore in found}
