"""Event streams: replayed from the database, followed live, ended with the job."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import httpx
import pytest
from api_calls import JOBS, create
from fastapi import FastAPI

from api.app import create_app
from api.routes import events as routes
from store import keys
from store.db.session import SessionFactory, transaction
from store.jobs import leases
from store.settings import StoreSettings


@dataclass(frozen=True, kw_only=True)
class Sent:
    seq: int
    code: str


def read(lines: Iterator[str]) -> Iterator[Sent]:
    """Yields the events of a stream without its heartbeat comments."""
    seq = 0
    for line in lines:
        if line.startswith("id: "):
            seq = int(line.removeprefix("id: "))
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["object"] == "fine_tuning.job.event"
            yield Sent(seq=seq, code=event["data"]["code"])


def follow(client: httpx.Client, job_id: str, **headers: str) -> list[Sent]:
    """Returns all events of a stream, until the server ends it."""
    with client.stream("GET", f"{JOBS}/{job_id}/events?stream=true", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(read(answer.iter_lines()))


def test_past_events_are_replayed_and_the_stream_ends_with_the_job(client: httpx.Client) -> None:
    job_id = create(client)["id"]
    for wish in ("pause", "resume", "cancel"):
        client.post(f"{JOBS}/{job_id}/{wish}")

    sent = follow(client, job_id)

    assert [event.seq for event in sent] == [1, 2, 3, 4]
    assert [event.code for event in sent] == ["CREATED", "PAUSED", "RESUMED", "CANCELLED"]


@pytest.mark.parametrize("seen", range(5))
def test_a_stream_continues_after_last_event_id(client: httpx.Client, seen: int) -> None:
    job_id = create(client)["id"]
    for wish in ("pause", "resume", "cancel"):
        client.post(f"{JOBS}/{job_id}/{wish}")
    sent = follow(client, job_id, **{"Last-Event-ID": str(seen)})
    assert [event.seq for event in sent] == list(range(seen + 1, 5))


def test_more_events_than_one_batch_come_in_order(client: httpx.Client, sessions: SessionFactory) -> None:
    job_id = create(client)["id"]
    with transaction(sessions) as session:
        claim = leases.claim(session, job_id=job_id, worker_id="w", purpose="prepare")
        assert claim is not None
        for number in range(2 * routes.BATCH):
            leases.record_event(session, claim, code="WARNING", message=f"row {number}")
    client.post(f"{JOBS}/{job_id}/cancel")
    assert [event.seq for event in follow(client, job_id)] == list(range(1, 2 * routes.BATCH + 3))


def test_a_stream_sends_each_event_as_it_is_written(client: httpx.Client) -> None:
    job_id = create(client)["id"]
    with client.stream("GET", f"{JOBS}/{job_id}/events?stream=true") as answer:
        sent = read(answer.iter_lines())
        assert next(sent).code == "CREATED"
        other = httpx.Client(base_url=client.base_url, headers=client.headers)
        with other:
            other.post(f"{JOBS}/{job_id}/pause")
            assert next(sent) == Sent(seq=2, code="PAUSED")
            other.post(f"{JOBS}/{job_id}/cancel")
            assert list(sent) == [Sent(seq=3, code="CANCELLED")]


def test_a_stream_ends_when_its_key_is_revoked(
    client: httpx.Client, sessions: SessionFactory, owner: str
) -> None:
    """The job goes on, and so do the owner's other keys; the revoked one is refused from then on."""
    job_id = create(client)["id"]
    with client.stream("GET", f"{JOBS}/{job_id}/events?stream=true") as answer:
        sent = read(answer.iter_lines())
        assert next(sent).code == "CREATED"
        with transaction(sessions) as session:
            [key] = keys.list_keys(session, owner_id=owner)
            keys.revoke(session, key_id=key.id)
        assert list(sent) == []
    assert client.get(f"{JOBS}/{job_id}").status_code == 401


def test_twenty_readers_hold_no_connection(client: httpx.Client) -> None:
    """More readers than the pool has connections; the API still answers other requests."""
    job_id = create(client)["id"]
    done: list[list[Sent]] = []
    limits = httpx.Limits(max_connections=40)
    with httpx.Client(base_url=client.base_url, headers=client.headers, limits=limits, timeout=20) as readers:
        threads = [threading.Thread(target=lambda: done.append(follow(readers, job_id))) for _ in range(25)]
        for thread in threads:
            thread.start()
        assert client.get(f"{JOBS}/{job_id}").status_code == 200
        client.post(f"{JOBS}/{job_id}/cancel")
        for thread in threads:
            thread.join()
    assert [[event.code for event in sent] for sent in done] == [["CREATED", "CANCELLED"]] * 25


def test_a_stream_without_events_sends_heartbeats(
    settings: StoreSettings,
    serving: Callable[[FastAPI], AbstractContextManager[str]],
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routes, "HEARTBEAT_SECONDS", 0.05)
    job_id = create(client)["id"]
    with (
        serving(create_app(settings)) as url,
        client.stream("GET", f"{url}{JOBS}/{job_id}/events?stream=true") as answer,
    ):
        lines = answer.iter_lines()
        assert any(line.startswith(": ping") for line in lines)


def test_an_empty_last_event_id_is_the_start(client: httpx.Client) -> None:
    job_id = create(client)["id"]
    client.post(f"{JOBS}/{job_id}/cancel").raise_for_status()
    assert follow(client, job_id, **{"Last-Event-ID": ""}) == follow(client, job_id)


@pytest.mark.parametrize("last", ["-1", "x", str(2**64)])
def test_an_invalid_folder_is_refused(client: httpx.Client, last: str) -> None:
    answer = client.get(f"{JOBS}/{create(client)['id']}/events?stream=true", headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "last-event-id")
