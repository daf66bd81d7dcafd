"""Log lines carry the ids of what is being done, in both formats, and nothing that is secret."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from datetime import datetime

import pytest
from sqlalchemy import exc, text

from store import logs
from store.logs import bound

log = logging.getLogger("a.module")
KEY = "heft_0123456789abcdef_s3cr3t-s3cr3t_s3cr3t"


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """The lines that were logged since the last call."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    # Handlers that pytest put there are no business of `configure`.
    root.handlers = []
    yield lambda: capsys.readouterr().err.splitlines()
    root.handlers, root.level = before, level


def test_json_lines_carry_the_ids(lines: Callable[[], list[str]]) -> None:
    logs.configure("json")
    with bound(job_id="ftjob-1"), bound(attempt=2):
        log.warning("the %s", "message")
    log.info("outside")
    inside, outside = (json.loads(line) for line in lines())
    assert datetime.fromisoformat(inside.pop("time")).tzinfo is not None
    expected = {"level": "WARNING", "logger": "a.module", "message": "the message"}
    assert inside == {**expected, "job_id": "ftjob-1", "attempt": 2}
    assert set(outside) == {"time", "level", "logger", "message"}


def test_text_lines_carry_the_ids(lines: Callable[[], list[str]]) -> None:
    logs.configure("text")
    with bound(request_id="req_1"):
        log.info("hello")
    assert lines()[0].endswith("INFO a.module: hello request_id=req_1")


def test_a_fault_is_one_line_of_json(lines: Callable[[], list[str]]) -> None:
    logs.configure("json")
    try:
        raise ValueError("what went wrong")
    except ValueError:
        log.exception("it failed")
    [line] = lines()
    assert "what went wrong" in json.loads(line)["exc_info"]


def test_a_thread_goes_on_with_the_ids(lines: Callable[[], list[str]]) -> None:
    logs.configure("json")
    with bound(job_id="ftjob-1"):
        thread = threading.Thread(target=copy_context().run, args=(log.info, "from a thread"))
    thread.start()
    thread.join()
    assert json.loads(lines()[0])["job_id"] == "ftjob-1"


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    ("written", "secret"),
    [
        (f"key {KEY} was sent", "s3cr3t"),
        ("Authorization: Bearer some-other-key", "some-other-key"),
        ("connecting to postgresql+psycopg://app:hunter2@db:5432/heft", "hunter2"),
        ("redis://:hunter2@broker:6379/0 is away", "hunter2"),
    ],
)
def test_secrets_are_blotted_out(
    lines: Callable[[], list[str]], log_format: logs.LogFormat, written: str, secret: str
) -> None:
    logs.configure(log_format)
    try:
        raise ValueError(written)
    except ValueError:
        log.exception("%s", written)
    output = "\n".join(lines())
    assert secret not in output
    assert "***" in output


def test_a_database_error_shows_no_values(bench) -> None:
    with pytest.raises(exc.DBAPIError) as failed:
        bench.do(lambda session: session.execute(text("SELECT :row / 0, :row::int"), {"row": 7_654_321}))
    assert "7654321" not in str(failed.value)


@pytest.mark.parametrize("part", [":", "://", "heft_", "heft_a_", "_", "a:", "://a:", "Bearer ", "@"])
def test_a_long_line_costs_one_pass(lines: Callable[[], list[str]], part: str) -> None:
    """30,000 colons after `://` once took 19 seconds; a quadratic pattern does not end within the test's time here."""
    logs.configure("text")
    log.info("%s", "see ://" + part * 1_000_000)
    assert len(lines()) == 1
