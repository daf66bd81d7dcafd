"""Exports: asked for once, built by one worker at a time, fenced like jobs."""

from __future__ import annotations

import pytest

from store import exports, models
from store.errors import InvalidRequest, LostFence, NotFound

OWNER = "team"


@pytest.fixture
def model_id(bench) -> str:
    return bench.succeed(bench.running()).fine_tuned_model


def ask(bench, model_id: str, format: str = "merged", owner_id: str = OWNER):
    return bench.do(exports.request, owner_id=owner_id, model_id=model_id, format=format)


def claim(bench, model_id: str, format: str = "merged"):
    return bench.do(exports.claim, model_id=model_id, format=format)


def expire(bench) -> None:
    bench.sql("UPDATE exports SET lease_until = now() - interval '1 second'")


def test_an_archive_is_built_once(bench, model_id: str) -> None:
    assert ask(bench, model_id).state == ask(bench, model_id).state == "pending"
    assert bench.do(exports.waiting) == [(model_id, "merged")]
    mine = claim(bench, model_id)
    assert mine is not None
    assert mine.model.storage_key is not None
    assert claim(bench, model_id) is None
    assert ask(bench, model_id).state == "building"
    assert bench.do(exports.waiting) == []
    bench.do(exports.heartbeat, mine)
    bench.do(exports.finish, mine, storage_key="exports/a.tar", size=10)
    ready = ask(bench, model_id)
    assert (ready.state, ready.storage_key, ready.bytes) == ("ready", "exports/a.tar", 10)
    assert claim(bench, model_id) is None


def test_a_lost_builder_is_replaced_and_can_write_nothing(bench, model_id: str) -> None:
    ask(bench, model_id)
    lost = claim(bench, model_id)
    expire(bench)
    assert bench.do(exports.waiting) == [(model_id, "merged")]
    new = claim(bench, model_id)
    assert new.attempt == lost.attempt + 1
    for write in (
        lambda: bench.do(exports.heartbeat, lost),
        lambda: bench.do(exports.finish, lost, storage_key="exports/b.tar", size=1),
        lambda: bench.do(exports.fail, lost, error={"code": "x", "message": "m", "param": None}),
    ):
        with pytest.raises(LostFence):
            write()
    bench.do(exports.finish, new, storage_key="exports/a.tar", size=10)


def test_an_archive_that_loses_every_builder_fails(bench, model_id: str) -> None:
    ask(bench, model_id)
    for _ in range(exports.MAX_LOSSES):
        assert claim(bench, model_id) is not None
        expire(bench)
    assert claim(bench, model_id) is None
    assert bench.do(exports.waiting) == []
    failed = ask(bench, model_id)
    assert (failed.state, failed.error["code"]) == ("failed", "worker_lost")


def test_a_worker_that_is_asked_to_stop_costs_nothing(bench, model_id: str) -> None:
    ask(bench, model_id)
    for _ in range(exports.MAX_LOSSES + 1):
        released = claim(bench, model_id)
        bench.do(exports.release, released)
        with pytest.raises(LostFence):
            bench.do(exports.finish, released, storage_key="exports/b.tar", size=1)
    assert claim(bench, model_id).attempt == exports.MAX_LOSSES + 2


def test_an_archive_that_failed_may_be_asked_for_again(bench, model_id: str) -> None:
    ask(bench, model_id)
    for _ in range(exports.MAX_LOSSES):
        claim(bench, model_id)
        expire(bench)
    bench.do(exports.waiting)
    assert ask(bench, model_id).state == "failed"
    bench.sql("UPDATE exports SET failed_at = now() - interval '11 minutes'")
    again = ask(bench, model_id)
    assert (again.state, again.error) == ("pending", None)
    bench.do(exports.finish, claim(bench, model_id), storage_key="exports/a.tar", size=10)
    assert ask(bench, model_id).state == "ready"


def test_a_failure_is_told(bench, model_id: str) -> None:
    ask(bench, model_id, "pyreft")
    error = {"code": "no_intervention", "message": "This model has no ReFT stage.", "param": "format"}
    bench.do(exports.fail, claim(bench, model_id, "pyreft"), error=error)
    assert (ask(bench, model_id, "pyreft").state, claim(bench, model_id, "pyreft")) == ("failed", None)
    assert ask(bench, model_id, "pyreft").error == error


def test_what_cannot_be_exported_is_refused(bench, model_id: str) -> None:
    bench.do(models.offer_base, model_id="smollm2-135m", source="alias", info={})
    with pytest.raises(NotFound):
        ask(bench, model_id, owner_id="others")
    with pytest.raises(NotFound):
        ask(bench, "unknown")
    with pytest.raises(InvalidRequest, match="base model"):
        ask(bench, "smollm2-135m")
    with pytest.raises(InvalidRequest) as refused:
        ask(bench, model_id, "gguf")
    assert refused.value.param == "format"
