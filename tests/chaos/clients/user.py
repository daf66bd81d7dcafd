"""Users of the service, over HTTP and nothing else: they make jobs, watch them, change their minds, and fetch models.

Each is a thread with random numbers of its own. A request that got no answer, or a 503, is sent again with the same
idempotency key until there is one, as a careful program does. It does NOT know of faults, nor judge what it sees.
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
from clients.evidence import Evidence
from clients.jobs import real_job, stand_in_job

ENDED = ("succeeded", "failed", "cancelled")
JOBS = "/v1/fine_tuning/jobs"
_TIMEOUT = httpx.Timeout(15.0)
_AGAIN_SECONDS = 0.3
_LOOK_SECONDS = 0.25

Json = dict[str, Any]


#: Of the monotonic clock; a function where it is not known beforehand.
Deadline = float | Callable[[], float]


def is_past(until: Deadline) -> bool:
    return time.monotonic() > (until() if callable(until) else until)


class GaveUp(Exception):
    """No answer, or no end, in the time there was."""


class Client:
    """Requests that are written down. Safe to use from one thread."""

    def __init__(self, url: str, key: str, log: Evidence) -> None:
        self._log = log
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=_TIMEOUT, trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def once(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """One request; None when no answer came."""
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

    def insist(self, method: str, path: str, *, until: Deadline, **options: Any) -> httpx.Response:
        """The same request until it is answered. Raises GaveUp at `until`."""
        while True:
            answer = self.once(method, path, **options)
            if answer is not None and answer.status_code < 500:
                return answer
            if is_past(until):
                raise GaveUp(f"{method} {path}")
            time.sleep(_AGAIN_SECONDS)

    def look(self, job_id: str, until: Deadline) -> Json:
        job: Json = self.insist("GET", f"{JOBS}/{job_id}", until=until).json()
        return job


class User(threading.Thread):
    """Makes job after job until `enough` is set; whoever joins it finds its last job ended.

    While faults go on nobody can say how long a job takes; after them its patience ends (seconds).
    """

    def __init__(
        self, *, name: str, seed: int, url: str, key: str, log: Evidence, enough: threading.Event,
        patience: float, real_share: float,
    ) -> None:  # fmt: skip
        super().__init__(name=name, daemon=True)
        self._random = Random(f"{seed}/{name}")
        self._url, self._key, self._log = url, key, log
        self._enough, self._patience, self._real_share = enough, patience, real_share
        self._client = Client(url, key, log)
        self._count = 0
        self._gives_up_at: float | None = None

    def run(self) -> None:
        try:
            while not self._enough.is_set():
                self._one_job()
        except GaveUp as reason:
            self._log.write("gave_up", user=self.name, reason=str(reason))
        except Exception as reason:
            # An answer that it did not expect; on its own thread nobody else would learn of it.
            self._log.write("gave_up", user=self.name, reason=repr(reason))
            raise
        finally:
            self._client.close()

    def _until(self) -> float:
        if self._gives_up_at is None and self._enough.is_set():
            self._gives_up_at = time.monotonic() + self._patience
        return float("inf") if self._gives_up_at is None else self._gives_up_at

    def _one_job(self) -> None:
        self._count += 1
        until = self._until
        name = f"{self.name}-{self._count}"
        real = self._random.random() < self._real_share
        wanted = real_job(self._random) if real else stand_in_job(self._random, name)
        uploaded = self._client.insist(
            "POST", "/v1/files", until=until, idempotency_key=f"file-{name}",
            data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", wanted.rows)},
        )  # fmt: skip
        body = {**wanted.body, "training_file": uploaded.json()["id"]}
        if self._random.random() < 0.06:
            self._eight_at_once(name, body, until)
        answer = self._client.insist("POST", JOBS, until=until, idempotency_key=f"job-{name}", json=body)
        job_id = answer.json()["id"]
        self._log.write("accepted", job=job_id, name=name, expect=wanted.expect)
        self._change_of_mind(job_id, until)
        self._until_ended(job_id, until)

    def _eight_at_once(self, name: str, body: Json, until: Deadline) -> None:
        def send(_: int) -> None:
            client = Client(self._url, self._key, self._log)
            client.once("POST", JOBS, idempotency_key=f"job-{name}", json=body)
            client.close()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(send, range(8)))

    def _change_of_mind(self, job_id: str, until: Deadline) -> None:
        """Some jobs are cancelled, at any moment of their lives; some are paused and go on."""
        wish = self._random.random()
        delay = self._random.uniform(0, 3)
        if wish < 0.15:
            self._enough.wait(delay)
            self._client.insist("POST", f"{JOBS}/{job_id}/cancel", until=until)
        elif wish < 0.30:
            self._enough.wait(delay)
            if self._client.insist("POST", f"{JOBS}/{job_id}/pause", until=until).status_code == 200:
                while self._client.look(job_id, until)["status"] not in ("paused", *ENDED):
                    time.sleep(_LOOK_SECONDS)
                self._client.insist("POST", f"{JOBS}/{job_id}/resume", until=until)

    def _until_ended(self, job_id: str, until: Deadline) -> None:
        while True:
            job = self._client.look(job_id, until)
            if (
                job["status"] == "paused"
            ):  # a pause that was asked for took effect after the resume was refused
                self._client.insist("POST", f"{JOBS}/{job_id}/resume", until=until)
            if job["status"] in ENDED:
                return
            if is_past(until):
                raise GaveUp(f"{job_id} is {job['status']}")
            time.sleep(_LOOK_SECONDS)


def fetch_model(client: Client, model_id: str, until: Deadline) -> dict[str, bytes]:
    """The files of a model as anybody may download them, by their names."""
    while True:
        answer = client.insist(
            "GET", f"/v1/models/{model_id}/export", params={"format": "bundle"}, until=until
        )
        if answer.status_code != 202:
            break
        if is_past(until):
            raise GaveUp(f"export of {model_id}")
        time.sleep(_LOOK_SECONDS)
    if answer.status_code != 200:
        raise GaveUp(f"export of {model_id}: {answer.text}")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        members = [
            (member.name.partition("/")[2], tar.extractfile(member)) for member in tar if member.isfile()
        ]
        return {name: content.read() for name, content in members if content is not None}


def manifest_of(files: dict[str, bytes]) -> dict[str, str]:
    """What a bundle says of itself; the engine's own leaves that to the service."""
    found: dict[str, str] = json.loads(files.get("manifest.json", b"{}"))
    return found
