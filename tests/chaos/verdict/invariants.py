"""The six invariants, judged from the client's own log, the database as it stands at the end, and the stored bytes.

    1  every accepted job has ended, in exactly one way
    2  at most one success and one model a job
    3  no write of a stale attempt was accepted
    4  what has ended never changed
    5  what is served is what the manifest says, and what the job had to come to
    6  nothing is left: no process, lock or temporary file (`ChaosStack.left_behind`)

Each function returns the violations it found, in words. It does NOT repair or excuse anything. Whether a job had a
cause to fail is judged in `causes`, where its attempts had to go on from in `resumed`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psycopg
from clients.evidence import Entry
from clients.user import ENDED, JOBS, manifest_of
from harness.stand_in import WEIGHTS, trained
from psycopg.rows import dict_row

from store.errors import Damaged
from store.storage.artifacts import Artifacts

Row = dict[str, Any]
#: Events that only the attempt which holds the job may write.
_HELD = {
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
    """Every job that any POST was answered with, whatever became of the other answers."""
    found = set()
    posts = {entry["n"] for entry in log if entry["kind"] == "request" and _creates_job(entry)}
    for entry in log:
        if entry["kind"] == "answer" and entry["to"] in posts and entry["status"] == 200:
            found.add(entry["body"]["id"])
    return found


def _creates_job(entry: Entry) -> bool:
    return bool(entry["method"] == "POST" and entry["path"] == JOBS)


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A job as one answer showed it. What it shows was so at some moment between the request and the answer."""

    asked: int
    answered: int
    job: Row

    @property
    def has_ended(self) -> bool:
        return self.job["status"] in ENDED


def sightings(log: Iterable[Entry]) -> dict[str, list[Sighting]]:
    """Every job object that the client was ever shown, by job, in the order of the answers."""
    seen: dict[str, list[Sighting]] = defaultdict(list)
    for entry in log:
        body = entry.get("body")
        if entry["kind"] == "answer" and entry["status"] == 200 and isinstance(body, dict):
            for job in body["data"] if body.get("object") == "list" else [body]:
                if job.get("object") == "fine_tuning.job":
                    seen[job["id"]].append(Sighting(asked=entry["to"], answered=entry["n"], job=job))
    return seen


def one_end(log: list[Entry], books: Books) -> list[str]:
    """1: nothing that was accepted is lost, and each has one end, the same for the client and in the books."""
    wrong = []
    seen = sightings(log)
    for job_id in sorted(accepted(log)):
        ends = {one.job["status"] for one in seen[job_id] if one.has_ended}
        row = books.jobs.get(job_id)
        if row is None:
            wrong.append(f"{job_id} was accepted and is not there")
        elif len(ends) != 1 or row["state"] not in ends:
            wrong.append(f"{job_id} was seen to end as {sorted(ends)}; the books say {row['state']}")
    wrong += [f"a user gave up: {entry['reason']}" for entry in log if entry["kind"] == "gave_up"]
    return wrong


def one_success(log: list[Entry], books: Books) -> list[str]:
    """2: at most one success and one model a job, and one job for each idempotency key."""
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
    """3: attempts follow one another, and none wrote after its end or after a later one had begun."""
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
        if event["data"]["code"] in _HELD and end is not None and event["created_at"] > end:
            wrong.append(f"{job_id}: attempt {event['attempt']} wrote {event['data']['code']} after its end")
        last[job_id] = event
    for row in books.checkpoints:
        end = ended[row["job_id"], row["attempt"]]
        if end is not None and row["created_at"] > end:
            wrong.append(f"{row['job_id']}: attempt {row['attempt']} saved step {row['step']} after its end")
    wrong += [f"{key}: attempt has no end" for key, end in ended.items() if end is None]
    wrong += [
        f"{job_id}: {job['event_seq']} events are counted, {last[job_id]['seq']} are there"
        for job_id, job in books.jobs.items()
        if job["event_seq"] != last[job_id]["seq"]
    ]
    return wrong


def ends_never_change(log: list[Entry]) -> list[str]:
    """4: once the client was shown that a job has ended, all that it asks from then on shows the same, to the last
    field. What it had asked before and is answered after may show the job as it was."""
    wrong = []
    for job_id, seen in sightings(log).items():
        ends = [one for one in seen if one.has_ended]
        if not ends:
            continue
        later = [one for one in seen if one.has_ended or one.asked > ends[0].answered]
        if any(one.job != ends[0].job for one in later):
            wrong.append(f"{job_id} changed after its end: {[one.job['status'] for one in later]}")
    return wrong


def served(expect: dict[str, Any], files: dict[str, bytes], manifest: dict[str, str]) -> list[str]:
    """5: a model as it was downloaded: what its own manifest and its row say, and what it had to come to."""
    told = manifest_of(files)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    wrong = [f"{name} is not what was stored" for name in manifest if hashes.get(name) != manifest[name]]
    wrong += [
        f"{name} differs from the bundle's own manifest" for name in told if hashes.get(name) != told[name]
    ]
    wrong += [f"{name} was never stored" for name in hashes.keys() - manifest.keys()]
    if "salt" in expect and files[WEIGHTS] != trained(expect["salt"], expect["seed"], expect["steps"]):
        wrong.append("the weights are not those of an uninterrupted run")
    return wrong


def stored(books: Books, artifacts: Artifacts) -> list[str]:
    """5: everything that a row names is there, bit for bit; nothing is there that no row names."""
    wrong, known = [], set()
    for row in books.files:
        if row["purged_at"] is None:
            known.add(row["storage_key"])
            wrong += _differs(artifacts, row["storage_key"], row["sha256"])
    kept = [row for row in books.stage_results if row["removed_at"] is None]
    for row in [*books.models, *kept]:
        for name, sha256 in row["manifest"].items():
            wrong += _differs(artifacts, f"{row['storage_key']}/{name}", sha256)
    not_purged = [row for row in [*books.models, *books.checkpoints] if row["purged_at"] is None]
    prefixes = [row["storage_key"] for row in [*not_purged, *books.stage_results]]
    for key in _keys(artifacts):
        if key not in known and not any(key.startswith(f"{prefix}/") for prefix in prefixes):
            wrong.append(f"{key} is stored and no row names it")
    return wrong


def only_503(log: list[Entry]) -> list[str]:
    """While servers were away: 503 with Retry-After, and no other fault of the service's own."""
    faults = [entry for entry in log if entry["kind"] == "answer" and entry["status"] >= 500]
    return [
        f"{entry['status']} in answer {entry['n']}: {entry['body']}"
        for entry in faults
        if entry["status"] != 503 or not entry["retry_after"]
    ]


def _differs(artifacts: Artifacts, key: str, sha256: str) -> list[str]:
    digest = hashlib.sha256()
    try:
        for chunk in artifacts.iter_bytes(key):
            digest.update(chunk)
    except Damaged as fault:
        return [str(fault)]
    return [] if digest.hexdigest() == sha256 else [f"{key} is stored with other bytes"]


def _keys(artifacts: Artifacts) -> Iterable[str]:
    root = artifacts._root
    for path in artifacts._fs.find(root):
        key = str(path)[len(root) + 1 :]
        if not key.startswith((".incomplete/", "exports/")):
            yield key
