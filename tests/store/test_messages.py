"""Hints: they reach a queue, never block, and are dropped while the broker is away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from store.messages.broker import Task, make_celery, redis_py_url
from store.messages.hints import Hints


@pytest.fixture
def hints(redis_url: str) -> Iterator[Hints]:
    hints = Hints(make_celery(redis_url))
    yield hints
    hints.close()


@pytest.fixture
def frozen_broker(tmp_path: Path) -> Iterator[str]:
    """A server that takes connections and never says a word, as a stopped Redis does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(16)
        yield f"redis+socket://{tmp_path / 's'}?virtual_host=0"


def test_a_hint_is_a_name_and_an_id_on_the_queue_of_its_purpose(hints: Hints, redis_url: str) -> None:
    hints.hint("ftjob-1", "train")
    hints.export("ft:m", "merged")
    hints.close()
    with Redis.from_url(redis_py_url(redis_url)) as redis:
        (train,), (export,) = redis.lrange("train", 0, -1), redis.lrange("export", 0, -1)
        assert redis.keys("celery*") == [], "no results are kept"
    assert json.loads(train)["headers"]["task"] == Task.TRAIN
    assert json.loads(train)["headers"]["argsrepr"] == "['ftjob-1']"
    assert json.loads(export)["headers"]["argsrepr"] == "['ft:m', 'merged']"


def test_a_broker_that_is_away_opens_the_breaker(tmp_path: Path) -> None:
    hints = Hints(make_celery(f"redis+socket://{tmp_path / 'nobody'}?virtual_host=0"))
    hints.hint("ftjob-1", "train")
    _until(lambda: hints.broker_is_away)
    hints.hint("ftjob-2", "train")
    hints.close()
    assert hints.broker_is_away


def test_a_frozen_broker_blocks_nobody(frozen_broker: str) -> None:
    hints = Hints(make_celery(frozen_broker))
    for number in range(100):
        hints.hint(f"ftjob-{number}", "train")
    assert not hints.broker_is_away, "nobody waits for the socket timeout"
    _until(lambda: hints.broker_is_away)
    hints.close()


def test_hints_flow_again_after_the_pause(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_celery(redis_url)
    working = app.send_task
    monkeypatch.setattr(app, "send_task", lambda *_, **__: (_ for _ in ()).throw(OSError("away")))
    hints = Hints(app, pause_seconds=0.05)
    hints.hint("ftjob-1", "train")
    _until(lambda: hints.broker_is_away)
    monkeypatch.setattr(app, "send_task", working)
    _until(lambda: not hints.broker_is_away)
    hints.hint("ftjob-2", "train")
    hints.close()
    with Redis.from_url(redis_py_url(redis_url)) as redis:
        assert redis.llen("train") == 1


@pytest.mark.parametrize(
    ("celery", "redis_py"),
    [
        ("redis://host:1/2", "redis://host:1/2"),
        ("rediss://:secret@host:1/2", "rediss://:secret@host:1/2"),
        ("redis+socket:///run/valkey.sock?virtual_host=3", "unix:///run/valkey.sock?db=3"),
        ("redis+socket:///run/valkey.sock", "unix:///run/valkey.sock?db=0"),
        ("redis+socket://:secret@/run/valkey.sock", "unix://:secret@/run/valkey.sock?db=0"),
    ],
)
def test_the_same_server_in_the_words_of_redis_py(celery: str, redis_py: str) -> None:
    assert redis_py_url(celery) == redis_py


def _until(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
