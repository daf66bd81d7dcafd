"""The result of a stage saves the owner's next job that stage; errors are cache misses and fail no job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select
from worker_bench import OWNER, Act, Bench, eventually

from store import models
from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import StageResult
from store.errors import Unavailable
from store.jobs import jobs, stage_results
from store.storage import garbage
from worker.chores.reconcile import collect_garbage

KEYS = ["a" * 64, "b" * 64, "c" * 64]
ASK: Act = {"do": "ask", "keys": KEYS}


def end_of_stage(step: int, key: str, **more: Any) -> Act:
    return {"do": "checkpoint", "kind": "stage", "step": step, "key": key, **more}


def stored(bench: Bench) -> list[StageResult]:
    """Returns the stored results, oldest first."""
    with transaction(bench.context.sessions) as session:
        return list(session.scalars(select(StageResult).order_by(StageResult.created_at)))


def reused(bench: Bench, acts: list[Act] | None = None, **options: Any) -> list[str]:
    """Runs a new job; returns the keys of the results that it reused."""
    job_id = bench.queued(acts or [ASK, {"do": "metrics", "step": 9}])
    assert bench.run(job_id, **options).state == JobState.SUCCEEDED
    return [event.data["key"] for event in bench.events(job_id) if event.data["code"] == "STAGE_REUSED"]


@pytest.fixture
def first(bench: Bench) -> str:
    """The id of a job whose first stage is stored."""
    job_id = bench.queued([{"do": "metrics", "step": 1}, end_of_stage(4, KEYS[0])])
    assert bench.run(job_id).state == JobState.SUCCEEDED
    return job_id


def test_a_second_job_of_the_owner_reuses_the_first_ones_stage(bench: Bench, first: str) -> None:
    (row,) = stored(bench)
    assert (row.owner_id, row.key, row.job_id) == (OWNER, KEYS[0], first)
    assert row.bytes == sum(len(part) for part in _bytes(bench, row))
    job_id = bench.queued([ASK, {"do": "wait"}])
    attempt = bench.start(job_id)
    bench.saw(job_id, "STAGE_REUSED")
    job = bench.job(job_id)
    assert (job.stage, job.progress["percent"], job.progress["step"]) == ("lora", 40.0, 4)
    assert "STAGE_KEYS" not in bench.codes(job_id)
    assert stored(bench)[0].last_used_at > row.last_used_at
    with transaction(bench.context.sessions) as session:
        jobs.request_cancel(session, owner_id=OWNER, job_id=job_id)
    attempt.result(60)


def test_another_owners_job_reuses_nothing(bench: Bench, first: str) -> None:
    assert reused(replace(bench, owner="stranger")) == []
    assert reused(bench) == KEYS[:1]


def test_each_owner_has_results_of_their_own(bench: Bench, first: str) -> None:
    stranger = replace(bench, owner="stranger")
    stranger.run(stranger.queued([end_of_stage(6, KEYS[0]), end_of_stage(8, KEYS[2])]))
    job_id = bench.queued([ASK])
    bench.run(job_id)
    (event,) = [event for event in bench.events(job_id) if event.data["code"] == "STAGE_REUSED"]
    assert event.data["step"] == 4, "of the owner's own job"


def test_only_a_prefix_of_the_stages_is_reused(bench: Bench, first: str) -> None:
    bench.run(bench.queued([end_of_stage(8, KEYS[2], stage_index=2)]))
    assert reused(bench) == KEYS[:1]
    bench.run(bench.queued([end_of_stage(6, KEYS[1], stage_index=1)]))
    assert reused(bench) == KEYS


def test_a_newer_result_replaces_an_older_one(bench: Bench, first: str) -> None:
    bench.run(bench.queued([end_of_stage(6, KEYS[0])]))
    old, new = stored(bench)
    assert old.removed_at is not None
    collect_garbage(bench.context)
    assert [row.storage_key for row in stored(bench)] == [new.storage_key]
    assert bench.context.artifacts.children(old.storage_key) == []
    assert reused(bench) == KEYS[:1]


def test_a_result_outlives_the_models_of_its_job(bench: Bench, first: str) -> None:
    with transaction(bench.context.sessions) as session:
        for model_id in (bench.job(first).fine_tuned_model, bench.checkpoints(first)[0].model_id):
            assert model_id is not None
            models.delete(session, owner_id=OWNER, model_id=model_id)
    garbage.collect(bench.context.sessions, bench.context.artifacts, quiet_seconds=0)
    assert [
        name for name in bench.context.artifacts.children(f"jobs/{first}/2") if "result" not in name
    ] == []
    assert reused(bench) == KEYS[:1]


@pytest.mark.parametrize("switch", ["job", "days", "bytes"])
def test_switched_off_by_the_job_or_the_operator(bench: Bench, first: str, switch: str) -> None:
    settings = {"days": {"reuse_days": 0}, "bytes": {"reuse_bytes": 0}}.get(switch, {})
    # Without a folder in its run file the engine asks for nothing; the fake engine would fail.
    job_id = bench.queued(
        [{"do": "metrics", "step": 9}, {"do": "told", "stage_dir": None}], reuse=switch != "job"
    )
    assert bench.run(job_id, bench.with_settings(**settings)).state == JobState.SUCCEEDED


def test_a_result_beyond_the_budget_is_not_stored(bench: Bench) -> None:
    bench.run(bench.queued([end_of_stage(4, KEYS[0])]), bench.with_settings(reuse_bytes=3))
    assert stored(bench) == []


@pytest.mark.parametrize("spoil", ["remove", "cut", "change"])
def test_an_incomplete_stage_is_not_stored(bench: Bench, spoil: str) -> None:
    job_id = bench.queued([end_of_stage(4, KEYS[0], spoil=spoil)])
    assert bench.run(job_id).state == JobState.SUCCEEDED
    assert stored(bench) == []


def test_a_job_whose_trainer_dies_after_the_reuse_resumes_from_there(bench: Bench, first: str) -> None:
    """The end of the reused stage is a checkpoint of this job."""
    end: Act = {"do": "checkpoint", "kind": "stage", "step": 4}
    dies: list[Act] = [{"do": "die", "code": 9, "once": True}, {"do": "metrics", "step": 9}]
    job_id = bench.queued([ASK | {"step": 4}, end, *dies])
    assert bench.run(job_id).state == JobState.QUEUED
    assert bench.run(job_id).state == JobState.SUCCEEDED
    assert bench.codes(job_id).count("STAGE_REUSED") == 1
    (checkpoint,) = bench.checkpoints(job_id)
    assert (checkpoint.step, str(checkpoint.model_id)[-9:]) == (4, "ckpt-lora")


# -- outages -------------------------------------------------------------------------------------------------


def test_a_damaged_result_is_a_miss_and_deleted(bench: Bench, first: str) -> None:
    bench.run(bench.queued([end_of_stage(6, KEYS[1], stage_index=1)]))
    bench.context.artifacts.put_stream(f"{stored(bench)[1].storage_key}/state.json", [b"{}"])
    assert reused(bench) == KEYS[:1]
    assert [row.removed_at is None for row in stored(bench)] == [True, False]


@pytest.mark.parametrize("fault", [Unavailable("storage is away"), OSError("no space left on this machine")])
def test_without_storage_it_is_a_miss(
    bench: Bench, first: str, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    fetch = bench.context.artifacts.fetch_directory

    def away(prefix: str, *rest: Any) -> None:
        if "/result-" in prefix:
            raise fault
        fetch(prefix, *rest)

    monkeypatch.setattr(bench.context.artifacts, "fetch_directory", away)
    assert reused(bench) == []
    assert stored(bench)[0].removed_at is None, "it is available when the storage is back"


@pytest.mark.parametrize("what", ["find", "add"])
def test_without_a_database_it_is_a_miss(
    bench: Bench, first: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise Unavailable("the database is away")

    monkeypatch.setattr(stage_results, what, away)
    acts = [ASK, end_of_stage(6, KEYS[1], stage_index=1)]
    assert reused(bench, acts) == ([] if what == "find" else KEYS[:1])
    assert len(stored(bench)) == (2 if what == "find" else 1)


def test_a_job_succeeds_without_storing_its_result(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    put = bench.context.artifacts.put_directory

    def full(prefix: str, *rest: Any) -> dict[str, str]:
        if "/result-" in prefix:
            raise Unavailable("no space left")
        return put(prefix, *rest)

    monkeypatch.setattr(bench.context.artifacts, "put_directory", full)
    job_id = bench.queued([end_of_stage(4, KEYS[0]), {"do": "metrics", "step": 9}])
    assert bench.run(job_id).state == JobState.SUCCEEDED
    assert stored(bench) == []
    assert [checkpoint.kind for checkpoint in bench.checkpoints(job_id)] == ["stage"]


def test_a_job_is_cancelled_while_its_results_are_fetched(
    bench: Bench, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch: Callable[..., None] = bench.context.artifacts.fetch_directory
    began, go_on = threading.Event(), threading.Event()

    def slow(prefix: str, *rest: Any) -> None:
        began.set()
        assert go_on.wait(60)
        fetch(prefix, *rest)

    monkeypatch.setattr(bench.context.artifacts, "fetch_directory", slow)
    job_id = bench.queued([ASK, {"do": "wait"}])
    attempt = bench.start(job_id, bench.with_settings(cancel_grace_seconds=0.2))
    assert began.wait(60)
    with transaction(bench.context.sessions) as session:
        jobs.request_cancel(session, owner_id=OWNER, job_id=job_id)
    eventually(lambda: bench.job(job_id).cancel_requested_at is not None)
    go_on.set()
    attempt.result(60)
    assert bench.job(job_id).state == JobState.CANCELLED


def _bytes(bench: Bench, row: StageResult) -> list[bytes]:
    names = [name for name in row.manifest if name != "manifest.json"]
    return [b"".join(bench.context.artifacts.iter_bytes(f"{row.storage_key}/{name}")) for name in names]
