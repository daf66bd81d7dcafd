"""Each invariant, with a log or tables that violate it."""

from __future__ import annotations

import hashlib
import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from clients.client_log import ClientLog
from clients.user import JOBS
from faults.damage import damage
from harness.fake_trainer import WEIGHTS, trained
from verdict import invariants

from store.storage.artifacts import Artifacts

JOB = "ftjob-1"
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
EXPECT = {"salt": "a", "seed": 1, "steps": 6}


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def shown(status: str, **more: Any) -> dict[str, Any]:
    return {"object": "fine_tuning.job", "id": JOB, "status": status, "fine_tuned_model": None, **more}


class Client:
    """A client's log, built by hand."""

    def __init__(self) -> None:
        self.log: list[dict[str, Any]] = []
        self.numbers = itertools.count(1)

    def ask(self, method: str, path: str, status: int, body: Any, key: str | None = None) -> Client:
        request = next(self.numbers)
        self.log.append({"kind": "request", "n": request, "method": method, "path": path, "key": key})
        answer = {"kind": "answer", "n": next(self.numbers), "to": request, "status": status, "body": body}
        self.log.append({**answer, "retry_after": None})
        return self

    def create(self, key: str | None = None, **more: Any) -> Client:
        return self.ask("POST", JOBS, 200, shown("validating_files", **more), key)

    def look(self, status: str, **more: Any) -> Client:
        return self.ask("GET", f"{JOBS}/{JOB}", 200, shown(status, **more))


def books(state: str = "succeeded", **changes: Any) -> invariants.Books:
    """Returns the tables of one job with two attempts, without a violation."""
    codes = [("CREATED", 0), ("VALIDATION_COMPLETE", 1), ("STARTED", 2), ("SUCCEEDED", 2)]
    events = [
        {"job_id": JOB, "seq": seq, "attempt": attempt, "created_at": at(seq), "data": {"code": code}}
        for seq, (code, attempt) in enumerate(codes, start=1)
    ]
    model = {
        "id": "ft:x",
        "job_id": JOB,
        "kind": "final",
        "storage_key": "m",
        "manifest": {},
        "purged_at": None,
    }
    tables: dict[str, Any] = {
        "jobs": {JOB: {"id": JOB, "state": state, "error": None, "event_seq": len(events)}},
        "attempts": [
            {"job_id": JOB, "number": 1, "ended_at": at(2)},
            {"job_id": JOB, "number": 2, "ended_at": at(4)},
        ],
        "events": events,
        "checkpoints": [],
        "models": [model],
        "files": [],
        "stage_results": [],
    }
    return invariants.Books(**(tables | changes))


def test_a_sound_run_is_found_sound() -> None:
    log = Client().create("k").create("k").look("running").look("succeeded").look("succeeded").log
    assert invariants.one_end(log, books()) == []
    assert invariants.one_success(log, books()) == []
    assert invariants.no_stale_write(books()) == []
    assert invariants.ends_never_change(log) == []
    assert invariants.only_503(log) == []


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (Client().create().look("running"), "seen to end as []"),
        (Client().create().look("failed"), "the database says succeeded"),
        (Client().create().look("failed").look("succeeded"), "['failed', 'succeeded']"),
    ],
)
def test_an_end_too_few_another_or_too_many(log: Client, found: str) -> None:
    assert found in invariants.one_end(log.log, books())[0]


def test_a_lost_job() -> None:
    log = Client().create().look("succeeded").log
    assert "does not exist" in invariants.one_end(log, books(jobs={}))[0]


def test_two_models_two_successes_or_none() -> None:
    two = books().models * 2
    assert "2 models" in invariants.one_success([], books(models=two))[0]
    assert "0 models" in invariants.one_success([], books(models=[]))[0]
    assert "1 models, 1 successes" in invariants.one_success([], books("cancelled"))[0]
    twice = [*books().events, {**books().events[-1], "seq": 5}]
    assert "2 successes" in invariants.one_success([], books(events=twice))[0]


def test_one_key_that_made_two_jobs() -> None:
    log = Client().create("k").create("k", id="ftjob-2").log
    assert invariants.one_success(log, books()) == ["key k made ['ftjob-1', 'ftjob-2']"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"attempt": 1}, "after a later one"),
        ({"created_at": at(5)}, "after its end"),
        ({"seq": 6}, "event 6 follows 3"),
    ],
)
def test_a_write_of_a_stale_attempt(changes: dict[str, Any], found: str) -> None:
    events = [*books().events[:3], {**books().events[3], **changes}]
    assert any(found in wrong for wrong in invariants.no_stale_write(books(events=events)))


def test_a_checkpoint_of_a_stale_attempt_and_an_attempt_without_an_end() -> None:
    late = [{"job_id": JOB, "attempt": 1, "step": 3, "created_at": at(3)}]
    assert "saved step 3 after its end" in invariants.no_stale_write(books(checkpoints=late))[0]
    open_end = [*books().attempts[:1], {**books().attempts[1], "ended_at": None}]
    assert "has no end" in invariants.no_stale_write(books(attempts=open_end))[0]


@pytest.mark.parametrize("later", [shown("failed"), shown("running"), shown("succeeded", finished_at=2)])
def test_an_end_that_changed(later: dict[str, Any]) -> None:
    log = Client().create().look("succeeded").ask("GET", JOBS, 200, {"object": "list", "data": [later]}).log
    assert "changed after its end" in invariants.ends_never_change(log)[0]


def test_an_answer_that_was_overtaken_shows_the_job_as_it_was() -> None:
    client = Client().create()
    asked = next(client.numbers)
    client.log.append({"kind": "request", "n": asked, "method": "GET", "path": f"{JOBS}/{JOB}", "key": None})
    client.look("succeeded")
    late = {"kind": "answer", "n": next(client.numbers), "to": asked, "status": 200, "body": shown("running")}
    client.log.append({**late, "retry_after": None})
    assert invariants.ends_never_change(client.log) == []
    client.look("running")
    assert "changed after its end" in invariants.ends_never_change(client.log)[0]


def bundle(weights: bytes) -> tuple[dict[str, bytes], dict[str, str]]:
    files = {WEIGHTS: weights, "manifest.json": b""}
    files["manifest.json"] = json.dumps({WEIGHTS: hashlib.sha256(weights).hexdigest()}).encode()
    return files, {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_served_weights() -> None:
    files, manifest = bundle(trained("a", 1, 6))
    assert invariants.served(EXPECT, files, manifest) == []
    assert invariants.served(EXPECT, {**files, WEIGHTS: b""}, manifest) != []
    one_step_less, its_manifest = bundle(trained("a", 1, 5))
    assert "uninterrupted" in invariants.served(EXPECT, one_step_less, its_manifest)[0]


def test_damaged_missing_and_forgotten_bytes(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path.as_uri())
    sha256 = artifacts.put_stream("m/weights", [b"weights"])
    model = {**books().models[0], "manifest": {"weights": sha256}}
    assert invariants.stored(books(models=[model]), artifacts) == []
    (tmp_path / "m/weights").write_bytes(b"weight5")
    assert "other bytes" in invariants.stored(books(models=[model]), artifacts)[0]
    (tmp_path / "m/weights").rename(tmp_path / "forgotten")
    missing, forgotten = invariants.stored(books(models=[model]), artifacts)
    assert "is missing" in missing
    assert "no row names it" in forgotten


@pytest.mark.parametrize(("status", "retry_after"), [(500, "1"), (503, None), (502, None)])
def test_an_answer_that_is_a_fault(status: int, retry_after: str | None) -> None:
    log = Client().ask("GET", JOBS, status, {}).log
    log[-1]["retry_after"] = retry_after
    assert len(invariants.only_503(log)) == 1


def test_damage_always_changes_the_file(tmp_path: Path) -> None:
    random, path = Random(1), tmp_path / "file"
    for _ in range(50):
        path.write_bytes(b"as it was")
        damage(random, path)
        assert path.read_bytes() != b"as it was"


def test_the_log_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    log = ClientLog(tmp_path / "log")
    log.write("request", path="/x", key=None)
    log.write("quiet")
    log.close()
    assert [(entry["n"], entry["kind"]) for entry in log.entries()] == [(1, "request"), (2, "quiet")]
