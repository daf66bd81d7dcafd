"""Simulated users: they create jobs over HTTP, poll, pause and cancel them, and download models.

Each is a thread with its own random generator. A request without an answer, or with a 503, is sent again with the same
idempotency key.
"""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import httpx
from clients.client_log import ClientLog
from clients.jobs import fake_job, real_job

ENDED = ("succeeded", "failed", "cancelled")
JOBS = "/v1/fine_tuning/jobs"
_TIMEOUT = httpx.Timeout(15.0)
_RETRY_SECONDS = 0.3
_POLL_SECONDS = 0.25

Json = dict[str, Any]


#: A time of the monotonic clock, or a function that returns it.
Deadline = float | Callable[[], float]


def is_past(until: Deadline) -> bool:
    return time.monotonic() > (until() if callable(until) else until)


class GaveUp(Exception):
    """No answer, or no end of a job, within the deadline."""


class Client:
    """An HTTP client that logs its requests and answers. Not thread-safe."""

    def __init__(self, url: str, key: str, log: ClientLog) -> None:
        self._log = log
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=_TIMEOUT, trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """Sends one request; returns None if no answer came."""
        key = options.pop("idempotency_key", None)
        if key is not None:
            options["headers"] = {"Idempotency-Key": key}
        number = self._log.write("request", method=method, path=path, key=key, body=options.get("json"))
        started = time.monotonic()
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            self._log.write("no_answer", to=number, error=type(error).__name__)
            return None
        body = answer.json() if "json" in answer.headers.get("content-type", "") else None
        self._log.write(
            "answer",
            to=number,
            status=answer.status_code,
            seconds=round(time.monotonic() - started, 3),
            retry_after=answer.headers.get("retry-after"),
            request_id=answer.headers.get("x-request-id"),
            body=body,
        )
        return answer

    def request(self, method: str, path: str, *, until: Deadline, **options: Any) -> httpx.Response:
        """Sends the request until it is answered without a server error. Raises GaveUp at `until`."""
        while True:
            answer = self.send(method, path, **options)
            if answer is not None and answer.status_code < 500:
                return answer
            if is_past(until):
                raise GaveUp(f"{method} {path}")
            time.sleep(_RETRY_SECONDS)

    def get_job(self, job_id: str, until: Deadline) -> Json:
        job: Json = self.request("GET", f"{JOBS}/{job_id}", until=until).json()
        return job


class User(threading.Thread):
    """Creates one job after the other until `stop` is set, and waits until the last one has ended.

    timeout: the seconds that it waits once `stop` is set; while faults are injected it waits without a limit.
    """

    def __init__(
        self, *, name: str, seed: int, url: str, key: str, log: ClientLog, stop: threading.Event,
        timeout: float, real_share: float,
    ) -> None:  # fmt: skip
        super().__init__(name=name, daemon=True)
        self._random = Random(f"{seed}/{name}")
        self._url, self._key, self._log = url, key, log
        self._stop_event, self._timeout, self._real_share = stop, timeout, real_share
        self._client = Client(url, key, log)
        self._count = 0
        self._gives_up_at: float | None = None

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self._one_job()
        except GaveUp as reason:
            self._log.write("gave_up", user=self.name, reason=str(reason))
        except Exception as reason:
            # An unexpected answer, which would be lost on this thread.
            self._log.write("gave_up", user=self.name, reason=repr(reason))
            raise
        finally:
            self._client.close()

    def _until(self) -> float:
        if self._gives_up_at is None and self._stop_event.is_set():
            self._gives_up_at = time.monotonic() + self._timeout
        return float("inf") if self._gives_up_at is None else self._gives_up_at

    def _one_job(self) -> None:
        self._count += 1
        until = self._until
        name = f"{self.name}-{self._count}"
        real = self._random.random() < self._real_share
        job = real_job(self._random) if real else fake_job(self._random, name)
        uploaded = self._client.request(
            "POST", "/v1/files", until=until, idempotency_key=f"file-{name}",
            data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", job.rows)},
        )  # fmt: skip
        body = {**job.body, "training_file": uploaded.json()["id"]}
        if self._random.random() < 0.06:
            self._eight_at_once(name, body, until)
        answer = self._client.request("POST", JOBS, until=until, idempotency_key=f"job-{name}", json=body)
        job_id = answer.json()["id"]
        self._log.write("accepted", job=job_id, name=name, expect=job.expect)
        self._cancel_or_pause_some(job_id, until)
        self._until_ended(job_id, until)

    def _eight_at_once(self, name: str, body: Json, until: Deadline) -> None:
        def send(_: int) -> None:
            client = Client(self._url, self._key, self._log)
            client.send("POST", JOBS, idempotency_key=f"job-{name}", json=body)
            client.close()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(send, range(8)))

    def _cancel_or_pause_some(self, job_id: str, until: Deadline) -> None:
        """Cancels or pauses and resumes some of the jobs, at a random time."""
        choice = self._random.random()
        delay = self._random.uniform(0, 3)
        if choice < 0.15:
            self._stop_event.wait(delay)
            self._client.request("POST", f"{JOBS}/{job_id}/cancel", until=until)
        elif choice < 0.30:
            self._stop_event.wait(delay)
            if self._client.request("POST", f"{JOBS}/{job_id}/pause", until=until).status_code == 200:
                while self._client.get_job(job_id, until)["status"] not in ("paused", *ENDED):
                    time.sleep(_POLL_SECONDS)
                self._client.request("POST", f"{JOBS}/{job_id}/resume", until=until)

    def _until_ended(self, job_id: str, until: Deadline) -> None:
        while True:
            job = self._client.get_job(job_id, until)
            if job["status"] == "paused":  # the pause took effect after the resume was refused
                self._client.request("POST", f"{JOBS}/{job_id}/resume", until=until)
            if job["status"] in ENDED:
                return
            if is_past(until):
                raise GaveUp(f"{job_id} is {job['status']}")
            time.sleep(_POLL_SECONDS)


def fetch_model(client: Client, model_id: str, until: Deadline) -> dict[str, bytes]:
    """Downloads a model; returns its files by name."""
    while True:
        answer = client.request(
            "GET", f"/v1/models/{model_id}/export", params={"format": "bundle"}, until=until
        )
        if answer.status_code != 202:
            break
        if is_past(until):
            raise GaveUp(f"export of {model_id}")
        time.sleep(_POLL_SECONDS)
    if answer.status_code != 200:
        raise GaveUp(f"export of {model_id}: {answer.text}")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        members = [
            (member.name.partition("/")[2], tar.extractfile(member)) for member in tar if member.isfile()
        ]
        return {name: content.read() for name, content in members if content is not None}


def manifest_of(files: dict[str, bytes]) -> dict[str, str]:
    """Returns a bundle's own manifest, which only the fake trainer writes."""
    manifest: dict[str, str] = json.loads(files.get("manifest.json", b"{}"))
    return manifest
