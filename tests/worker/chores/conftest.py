"""The engine's commands for studies, answered in the test's own process."""

from __future__ import annotations

from typing import Any

import pytest

from heft_engine.commands import compare, suggest
from worker.chores import compare_studies


@pytest.fixture
def engine_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the half second that each child process takes to start."""

    def query(_context: Any, command_name: str, question: dict[str, Any]) -> dict[str, Any]:
        command: Any = {"compare": compare, "suggest": suggest}[command_name]
        answer: dict[str, Any] = command.answer(command.Question.model_validate(question))
        return answer

    monkeypatch.setattr(compare_studies, "query_engine", query)
