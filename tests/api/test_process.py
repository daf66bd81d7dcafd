"""The API's process: start time, memory, no torch, and shutdown."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from api_calls import JOBS, MINIMAL, create

from store.settings import StoreSettings

MAX_START_SECONDS = 2.0
MAX_BYTES = 200 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Served:
    process: subprocess.Popen[bytes]
    url: str
    started_in: float  #: processor seconds until /healthz answered


@contextmanager
def serving_process(settings: StoreSettings) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["uvicorn", "api.app:create_app", "--factory", "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={
            "PATH": os.environ["PATH"],
            "HEFT_DATABASE_URL": settings.database_url,
            "HEFT_REDIS_URL": settings.redis_url,
            "HEFT_ARTIFACTS_URL": settings.artifacts_url,
        },
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                assert httpx.get(f"{url}/healthz", timeout=1).json() == {"status": "ok"}
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.02)
        used = psutil.Process(process.pid).cpu_times()
        yield Served(process=process, url=url, started_in=used.user + used.system)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(settings: StoreSettings) -> Iterator[Served]:
    with serving_process(settings) as served:
        yield served


def test_it_starts_quickly_and_stays_small(served: Served) -> None:
    # Processor time, because wall time depends on other programs on this machine.
    assert served.started_in < MAX_START_SECONDS
    for path in ("/readyz", "/openapi.json", "/docs"):
        assert httpx.get(served.url + path, timeout=20).status_code == 200
    assert psutil.Process(served.process.pid).memory_info().rss < MAX_BYTES


def test_a_large_file_is_never_whole_in_memory(served: Served, client: httpx.Client) -> None:
    """100 MB are uploaded and downloaded, and the process's memory hardly grows."""
    pieces, piece = 100, b"x" * 1_000_000

    def form() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
        yield from (piece for _ in range(pieces))
        yield b"\r\n--b--\r\n"

    process = psutil.Process(served.process.pid)
    before = process.memory_info().rss
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    created = client.post(f"{served.url}/v1/files", content=form(), headers=headers).json()
    assert created["bytes"] == pieces * len(piece)
    with client.stream("GET", f"{served.url}/v1/files/{created['id']}/content") as answer:
        assert sum(len(chunk) for chunk in answer.iter_bytes()) == created["bytes"]
    assert process.memory_info().rss - before < 40 * 1024**2


def test_it_stops_on_sigterm_although_a_stream_is_open(settings: StoreSettings, client: httpx.Client) -> None:
    job_id = create(client)["id"]
    with (
        serving_process(settings) as served,
        client.stream("GET", f"{served.url}{JOBS}/{job_id}/events?stream=true") as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(15) in (0, -signal.SIGTERM)


def test_the_log_has_request_and_job_ids_and_no_secrets(
    settings: StoreSettings, client: httpx.Client, tmp_path: Path
) -> None:
    """The process of `heft api`, with passwords in its URLs, and a broker that does not answer."""
    log = tmp_path / "log"
    with_password = settings.database_url.replace("app@", "app:hunter2@")
    row = b'{"question": "a row that nobody else may read", "answer": true}'
    with log.open("wb") as errors, socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cli",
                "--home",
                str(tmp_path / "home"),
                "api",
                "--fd",
                str(listener.fileno()),
            ],
            env={
                "PATH": os.environ["PATH"],
                "HEFT_DATABASE_URL": with_password,
                "HEFT_REDIS_URL": "redis://:hunter2@127.0.0.1:9/0",
                "HEFT_ARTIFACTS_URL": settings.artifacts_url,
                "HEFT_LOG_FORMAT": "json",
            },
            pass_fds=[listener.fileno()],
            stderr=errors,
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answer = client.post(f"{url}{JOBS}", json=MINIMAL)
        files = {"file": ("x.jsonl", row)}
        assert client.post(f"{url}/v1/files", files=files, data={"purpose": "fine-tune"}).status_code == 200
        process.terminate()
        process.wait(20)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    accepted = next(line for line in lines if line.get("job_id") == answer.json()["id"])
    assert accepted["request_id"] == answer.headers["x-request-id"]
    text = log.read_text()
    assert "broker" in text, "it says that its broker is away"
    for secret in ("hunter2", client.headers["authorization"].removeprefix("Bearer "), "nobody else"):
        assert secret not in text


def test_the_api_imports_no_torch() -> None:
    code = "import sys, api.app; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "peft", "numpy", "datasets", "pandas"} & set(output.split())
