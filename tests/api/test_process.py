"""The API as a process: quick to start, small, without torch, and gone when it is told to go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil
import pytest
from api_calls import JOBS, create

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
    # Processor time: what the clock on the wall shows depends on who else is at work on this machine.
    assert served.started_in < MAX_START_SECONDS
    for path in ("/readyz", "/openapi.json", "/docs"):
        assert httpx.get(served.url + path, timeout=20).status_code == 200
    assert psutil.Process(served.process.pid).memory_info().rss < MAX_BYTES


def test_a_large_file_is_never_whole_in_memory(served: Served, client: httpx.Client) -> None:
    """100 MB in and out, and the process is hardly larger than before."""
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


def test_it_ends_when_told_to_although_somebody_listens(
    settings: StoreSettings, client: httpx.Client
) -> None:
    job_id = create(client)["id"]
    with (
        serving_process(settings) as served,
        client.stream("GET", f"{served.url}{JOBS}/{job_id}/events?stream=true") as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(15) in (0, -signal.SIGTERM)


def test_nothing_that_it_imports_imports_torch() -> None:
    code = "import sys, api.app; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "peft", "numpy", "datasets", "pandas"} & set(output.split())
