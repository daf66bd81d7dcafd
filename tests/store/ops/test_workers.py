"""Workers: seen while they write, gone when they say so or fall silent."""

from __future__ import annotations

from store import models
from store.ops import workers


def test_workers_are_seen_while_they_write(bench) -> None:
    bench.do(workers.register, worker_id="a", role="train", info={"pid": 1})
    bench.do(workers.register, worker_id="b", role="inference", info={})
    bench.do(workers.register, worker_id="a", role="train", info={"pid": 2})  # restarted
    assert [(row.id, row.info) for row in bench.do(workers.list_workers)] == [("a", {"pid": 2}), ("b", {})]
    assert [row.id for row in bench.do(workers.list_workers, role="inference")] == ["b"]
    bench.sql("UPDATE workers SET seen_at = now() - interval '61 seconds'")
    assert bench.do(workers.list_workers) == []
    bench.do(workers.heartbeat, worker_id="b")
    assert [row.id for row in bench.do(workers.list_workers)] == ["b"]
    bench.do(workers.unregister, worker_id="b")
    assert bench.do(workers.list_workers) == []


def test_base_models_are_listed_once_a_worker_has_looked(bench) -> None:
    assert not bench.do(workers.base_models_are_listed)
    bench.do(workers.register, worker_id="train-1", role="train", info={})
    assert not bench.do(workers.base_models_are_listed)
    bench.do(workers.update_info, worker_id="train-1", changes={workers.LISTED: True})
    assert bench.do(workers.base_models_are_listed), "it has found none"
    bench.do(workers.unregister, worker_id="train-1")
    bench.do(models.offer_base, model_id="tiny", source="directory", info={})
    assert bench.do(workers.base_models_are_listed)
