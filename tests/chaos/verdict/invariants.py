"""The six invariants, checked in the client's log, the database at the end, and the stored files.

    1  every accepted job has ended, in exactly one way
    2  at most one success and one model a job
    3  no write of a stale attempt was accepted
    4  a job that has ended never changes
    5  a served model is what its manifest says, and the right result of its job
    6  no process, lock or temporary file remains (`ChaosStack.left_behind`)

Each function returns a sentence for each violation. `causes` checks whether a job had a cause to fail, `resumes` where
its attempts resumed.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psycopg
from clients.client_log import Entry
from clients.user import ENDED, JOBS, manifest_of
from harness.fake_trainer import WEIGHTS, trained
from psycopg.rows import dict_row

from store.errors import Damaged
from store.storage.artifacts import Artifacts

Row = dict[str, Any]
#: Events that only the current attempt may write.
_ATTEMPT_EVENTS = {
    "STARTED",
    "STAGE_STARTED",
    "METRICS",
    "CHECKPOINT_SAVED",
    "SUCCEEDED",
    "EVALUATION",
    "VALIDATION_COMPLETE",
}


@dataclass(frozen=True, kw_only=True)
class Books:
    """The tables, read in one transaction at the end."""

    jobs: dict[str, Row]
    attempts: list[Row]
    events: list[Row]
    checkpoints: list[Row]
    models: list[Row]
    files: list[Row]
    stage_results: list[Row]

    @classmethod
    def read(cls, url: str) -> Books:
        plain = url.replace("postgresql+psycopg", "postgresql")
        with psycopg.connect(plain, row_factory=dict_row) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ

            def table(name: str, order: str) -> list[Row]:
                return connection.execute(f"SELECT * FROM {name} ORDER BY {order}").fetchall()

            return cls(
                jobs={row["id"]: row for row in table("jobs", "id")},
                attempts=table("attempts", "job_id, number"),
                events=table("events", "job_id, seq"),
                checkpoints=table("checkpoints", "job_id, attempt, step"),
                models=table("models", "id"),
                files=table("files", "id"),
                stage_results=table("stage_results", "storage_key"),
            )


def accepted(log: Iterable[Entry]) -> set[str]:
    """Returns the ids of all jobs in answers to a POST."""
    job_ids = set()
    posts = {entry["n"] for entry in log if entry["kind"] == "request" and _creates_job(entry)}
    for entry in log:
        if entry["kind"] == "answer" and entry["to"] in posts and entry["status"] == 200:
            job_ids.add(entry["body"]["id"])
    return job_ids


def _creates_job(entry: Entry) -> bool:
    return bool(entry["method"] == "POST" and entry["path"] == JOBS)


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A job in one answer: its state at some time between the request and the answer."""

    asked: int
    answered: int
    job: Row

    @property
    def has_ended(self) -> bool:
        return self.job["status"] in ENDED


def sightings(log: Iterable[Entry]) -> dict[str, list[Sighting]]:
    """Returns all job objects in answers, by job, in the order of the answers."""
    by_job: dict[str, list[Sighting]] = defaultdict(list)
    for entry in log:
        body = entry.get("body")
        if entry["kind"] == "answer" and entry["status"] == 200 and isinstance(body, dict):
            for job in body["data"] if body.get("object") == "list" else [body]:
                if job.get("object") == "fine_tuning.job":
                    by_job[job["id"]].append(Sighting(asked=entry["to"], answered=entry["n"], job=job))
    return by_job


def one_end(log: list[Entry], books: Books) -> list[str]:
    """Invariant 1: no accepted job is lost, and each has one end, the same for the client and in the tables."""
    wrong = []
    seen = sightings(log)
    for job_id in sorted(accepted(log)):
        ends = {sighting.job["status"] for sighting in seen[job_id] if sighting.has_ended}
        row = books.jobs.get(job_id)
        if row is None:
            wrong.append(f"{job_id} was accepted and does not exist")
        elif len(ends) != 1 or row["state"] not in ends:
            wrong.append(f"{job_id} was seen to end as {sorted(ends)}; the database says {row['state']}")
    wrong += [f"a user gave up: {entry['reason']}" for entry in log if entry["kind"] == "gave_up"]
    return wrong


def one_success(log: list[Entry], books: Books) -> list[str]:
    """Invariant 2: at most one success and one model a job, and one job for each idempotency key."""
    finals = Counter(model["job_id"] for model in books.models if model["kind"] == "final")
    successes = Counter(event["job_id"] for event in books.events if event["data"]["code"] == "SUCCEEDED")
    wrong = []
    for job_id, job in books.jobs.items():
        due = int(job["state"] == "succeeded")
        if (finals[job_id], successes[job_id]) != (due, due):
            wrong.append(f"{job_id} {job['state']}: {finals[job_id]} models, {successes[job_id]} successes")
    keys: dict[str, set[str]] = defaultdict(set)
    asked = {entry["n"]: entry["key"] for entry in log if entry["kind"] == "request" and entry["key"]}
    for entry in log:
        if entry["kind"] == "answer" and entry["status"] == 200 and entry["to"] in asked:
            keys[asked[entry["to"]]].add(entry["body"]["id"])
    wrong += [f"key {key} made {sorted(made)}" for key, made in keys.items() if len(made) > 1]
    return wrong


def no_stale_write(books: Books) -> list[str]:
    """Invariant 3: no attempt wrote after its end or after a later attempt had begun."""
    wrong = []
    ended = {(row["job_id"], row["number"]): row["ended_at"] for row in books.attempts}
    last: dict[str, Row] = {}
    for event in books.events:
        job_id, before = event["job_id"], last.get(event["job_id"])
        if event["seq"] != (before["seq"] + 1 if before else 1):
            wrong.append(f"{job_id}: event {event['seq']} follows {before and before['seq']}")
        if before and event["attempt"] < before["attempt"]:
            wrong.append(f"{job_id}: attempt {event['attempt']} wrote event {event['seq']} after a later one")
        end = ended.get((job_id, event["attempt"]))
        if event["data"]["code"] in _ATTEMPT_EVENTS and end is not None and event["created_at"] > end:
            wrong.append(f"{job_id}: attempt {event['attempt']} wrote {event['data']['code']} after its end")
        last[job_id] = event
    for row in books.checkpoints:
        end = ended[row["job_id"], row["attempt"]]
        if end is not None and row["created_at"] > end:
            wrong.append(f"{row['job_id']}: attempt {row['attempt']} saved step {row['step']} after its end")
    wrong += [f"{key}: attempt has no end" for key, end in ended.items() if end is None]
    wrong += [
        f"{job_id}: {job['event_seq']} events are counted, {last[job_id]['seq']} exist"
        for job_id, job in books.jobs.items()
        if job["event_seq"] != last[job_id]["seq"]
    ]
    return wrong


def ends_never_change(log: list[Entry]) -> list[str]:
    """Invariant 4: every answer to a request sent after an answer with the end of a job shows the same job.

    Answers to requests that were sent before may still show the job before its end.
    """
    wrong = []
    for job_id, seen in sightings(log).items():
        ends = [sighting for sighting in seen if sighting.has_ended]
        if not ends:
            continue
        first = ends[0]
        later = [sighting for sighting in seen if sighting.has_ended or sighting.asked > first.answered]
        if any(sighting.job != first.job for sighting in later):
            statuses = [sighting.job["status"] for sighting in later]
            wrong.append(f"{job_id} changed after its end: {statuses}")
    return wrong


def served(expect: dict[str, Any], files: dict[str, bytes], manifest: dict[str, str]) -> list[str]:
    """Invariant 5: a downloaded model matches its own manifest, its row, and the expected weights."""
    own_manifest = manifest_of(files)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    wrong = [f"{name} is not what was stored" for name in manifest if hashes.get(name) != manifest[name]]
    wrong += [
        f"{name} differs from the bundle's own manifest"
        for name in own_manifest
        if hashes.get(name) != own_manifest[name]
    ]
    wrong += [f"{name} was never stored" for name in hashes.keys() - manifest.keys()]
    if "salt" in expect and files[WEIGHTS] != trained(expect["salt"], expect["seed"], expect["steps"]):
        wrong.append("the weights are not those of an uninterrupted run")
    return wrong


def stored(books: Books, artifacts: Artifacts) -> list[str]:
    """Invariant 5: every file that a row names is stored, bit for bit, and no other file is."""
    wrong, file_keys = [], set()
    for row in books.files:
        if row["purged_at"] is None:
            file_keys.add(row["storage_key"])
            wrong += _differs(artifacts, row["storage_key"], row["sha256"])
    current_results = [row for row in books.stage_results if row["removed_at"] is None]
    for row in [*books.models, *current_results]:
        for name, sha256 in row["manifest"].items():
            wrong += _differs(artifacts, f"{row['storage_key']}/{name}", sha256)
    not_purged = [row for row in [*books.models, *books.checkpoints] if row["purged_at"] is None]
    prefixes = [row["storage_key"] for row in [*not_purged, *books.stage_results]]
    for key in _keys(artifacts):
        if key not in file_keys and not any(key.startswith(f"{prefix}/") for prefix in prefixes):
            wrong.append(f"{key} is stored and no row names it")
    return wrong


def only_503(log: list[Entry]) -> list[str]:
    """No answer is a server error other than 503 with Retry-After."""
    errors = [entry for entry in log if entry["kind"] == "answer" and entry["status"] >= 500]
    return [
        f"{entry['status']} in answer {entry['n']}: {entry['body']}"
        for entry in errors
        if entry["status"] != 503 or not entry["retry_after"]
    ]


def _differs(artifacts: Artifacts, key: str, sha256: str) -> list[str]:
    digest = hashlib.sha256()
    try:
        for chunk in artifacts.iter_bytes(key):
            digest.update(chunk)
    except Damaged as damage:
        return [str(damage)]
    return [] if digest.hexdigest() == sha256 else [f"{key} is stored with other bytes"]


def _keys(artifacts: Artifacts) -> Iterable[str]:
    root = artifacts._root
    for path in artifacts._fs.find(root):
        key = str(path)[len(root) + 1 :]
        if not key.startswith((".incomplete/", "exports/")):
            yield key
