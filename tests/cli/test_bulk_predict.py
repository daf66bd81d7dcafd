"""`heft predict --file` against a scripted service that is busy, slow, or stops in the middle."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from running_stack import heft
from typer.testing import Result

Reply = tuple[int, dict[str, Any], dict[str, str]]


class Answering:
    """Answers whether each question's number is even; `before` can answer a request instead."""

    def __init__(self) -> None:
        self.url = ""
        self.answered: list[list[int]] = []
        self.before: Callable[[list[int]], Reply | None] = lambda numbers: None
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def reply(self, body: dict[str, Any]) -> Reply:
        numbers = [int(row["question"]) for row in body["inputs"]]
        with self._lock:
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            reply = self.before(numbers)
            if reply is None:
                reply = 200, {"data": [answer(number) for number in numbers]}, {}
                with self._lock:
                    self.answered.append(numbers)
            return reply
        finally:
            with self._lock:
                self._under_way -= 1


def answer(number: int) -> dict[str, Any]:
    text, unsure = ("no", "yes")[number % 2 == 0], number % 10 == 9
    return {"answer": None if unsure else text, "abstained": unsure, "probability": 0.9, "number": number}


def refusal(status: int, code: str, retry_after: str = "0", param: str | None = None) -> Reply:
    error = {"message": "not now", "type": "t", "code": code, "param": param}
    return status, {"error": error}, {"Retry-After": retry_after}


@pytest.fixture
def service() -> Iterator[Answering]:
    scripted = Answering()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, value, headers = scripted.reply(body)
            content = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scripted.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield scripted
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """100 rows, every tenth with a wrong answer."""
    path = tmp_path / "rows.jsonl"
    lines = [{"question": str(n), "answer": (n % 2 == 0) != (n % 10 == 0)} for n in range(100)]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return path


def run(service: Answering, rows: Path, out: Path, *options: str) -> Result:
    flags = ["predict", "m", "--file", str(rows), "--out", str(out), "--batch", "7", *options]
    return heft("--url", service.url, "--api-key", "k", *flags)


def numbers(out: Path) -> list[int]:
    return [json.loads(line)["number"] for line in out.read_text().splitlines()]


def test_answers_of_concurrent_requests_are_in_the_order_of_the_rows(
    service: Answering, rows: Path, tmp_path: Path
) -> None:
    arrived = threading.Barrier(3, timeout=10)

    def together(numbers: list[int]) -> None:
        if numbers[0] < 21:
            arrived.wait()

    service.before = together
    out = tmp_path / "answers.jsonl"
    result = run(service, rows, out, "--requests", "3")
    assert result.exit_code == 0, result.output
    assert numbers(out) == list(range(100))
    assert service.most_at_once == 3
    assert "100 rows in" in result.stderr
    assert "yes 50, no 40\nabstained 10\naccuracy 88.9% (80 of 90 answered)" in result.stderr


def test_requests_refused_by_a_busy_service_are_retried_after_its_retry_after(
    service: Answering, rows: Path, tmp_path: Path
) -> None:
    refused: list[tuple[float, int]] = []

    def busy(numbers: list[int]) -> Reply | None:
        if len(refused) < 4:
            refused.append((time.monotonic(), numbers[0]))
            return refusal(429, "rate_limit_exceeded", "0.3") if len(refused) % 2 else refusal(502, "away")
        return None

    service.before = busy
    out = tmp_path / "answers.jsonl"
    started = time.monotonic()
    assert run(service, rows, out, "--requests", "2").exit_code == 0
    assert time.monotonic() - started >= 0.3
    assert numbers(out) == list(range(100))
    assert len(refused) == 4


def test_requests_that_time_out_are_split(service: Answering, rows: Path, tmp_path: Path) -> None:
    service.before = lambda numbers: refusal(503, "model_not_ready") if len(numbers) > 2 else None
    out = tmp_path / "answers.jsonl"
    assert run(service, rows, out).exit_code == 0
    assert numbers(out) == list(range(100))
    assert max(map(len, service.answered)) <= 2


def test_requests_that_are_too_large_are_split(service: Answering, rows: Path, tmp_path: Path) -> None:
    service.before = lambda numbers: refusal(413, "too_large") if len(numbers) > 1 else None
    out = tmp_path / "answers.jsonl"
    assert run(service, rows, out).exit_code == 0
    assert numbers(out) == list(range(100))


def test_a_row_that_is_too_large_alone_is_named(service: Answering, rows: Path, tmp_path: Path) -> None:
    service.before = lambda numbers: refusal(413, "too_large") if 5 in numbers else None
    result = run(service, rows, tmp_path / "answers.jsonl")
    assert result.exit_code == 1
    assert "line 11: " in result.stderr  # every other line is empty


def test_an_interrupted_run_is_continued(service: Answering, rows: Path, tmp_path: Path) -> None:
    service.before = lambda numbers: refusal(500, "internal_error") if 50 in numbers else None
    out = tmp_path / "answers.jsonl"
    result = run(service, rows, out, "--requests", "1")
    assert result.exit_code == 1
    assert "(49 of 100 rows are answered)" in result.stderr
    assert numbers(out) == list(range(49))
    out.write_bytes(out.read_bytes() + b'{"answer": "ye')

    service.before, service.answered = lambda numbers: None, []
    assert run(service, rows, out).exit_code == 0
    assert numbers(out) == list(range(100))
    assert min(number for numbers in service.answered for number in numbers) == 49
    service.answered = []
    assert run(service, rows, out).exit_code == 0
    assert service.answered == [], "all of it is there"


def test_answers_of_another_model_are_not_mixed_in(service: Answering, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(service, rows, out).exit_code == 0
    before, service.answered = out.read_bytes(), []
    result = run(service, rows, out, "--scale", "0.5")
    assert result.exit_code == 1
    assert "with other options" in result.stderr
    assert (out.read_bytes(), service.answered) == (before, [])


def test_an_invalid_row_is_reported_with_its_line(service: Answering, rows: Path, tmp_path: Path) -> None:
    def refuse(numbers: list[int]) -> Reply | None:
        return (
            refusal(400, "invalid_value", param=f"inputs[{numbers.index(45)}].x") if 45 in numbers else None
        )

    service.before = refuse
    result = run(service, rows, tmp_path / "answers.jsonl")
    assert result.exit_code == 1
    assert "line 91: not now" in result.stderr


def test_retries_end_after_a_time_limit(
    service: Answering, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.bulk_predict.RETRY_SECONDS", 0.2)
    service.before = lambda numbers: refusal(503, "overloaded", "0.1")
    result = run(service, rows, tmp_path / "answers.jsonl")
    assert result.exit_code == 1
    assert "the service answered nothing for" in result.stderr
