"""The engine's command line in this process: its exit code and its output."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from heft_engine.commands.main import main

Printed = dict[str, Any]
Command = Callable[..., tuple[int, list[Printed], str]]


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Command]:
    """`command("train", …)` → exit code, the JSON lines on stdout, what is on stderr. Restores signal handlers."""
    # Stages that earlier tests have trained would be reused.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments: Any) -> tuple[int, list[Printed], str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
