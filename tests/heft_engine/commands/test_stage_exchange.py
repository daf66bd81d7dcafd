"""Results that the starter brings: asked for once, waited for as long as it makes sense."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from heft_engine.commands.stage_exchange import ANSWERED, RequestedStages
from heft_engine.events import Event


@pytest.fixture
def told() -> list[Event]:
    return []


def store(
    tmp_path: Path, told: list[Event], *, stopping: bool = False, timeout: float = 60.0
) -> RequestedStages:
    return RequestedStages(
        directory=tmp_path, on_event=told.append, should_stop=lambda: stopping, timeout_seconds=timeout
    )


def test_what_is_brought_while_it_waits_is_found(tmp_path: Path, told: list[Event]) -> None:
    def bring() -> None:
        for key in ("a", "b", "d"):
            (tmp_path / key).mkdir()
        (tmp_path / ANSWERED).touch()

    answer = threading.Timer(0.2, bring)
    answer.start()
    found = store(tmp_path, told).find(["a", "b", "c", "d"])
    answer.join()
    assert found == [tmp_path / "a", tmp_path / "b"], "up to the first that is missing"
    assert [(event.code, event.data) for event in told] == [("STAGE_KEYS", {"keys": ["a", "b", "c", "d"]})]


@pytest.mark.parametrize(("stopping", "timeout"), [(True, 60.0), (False, 0.1)])
def test_without_an_answer_nothing_is_found(
    tmp_path: Path, told: list[Event], stopping: bool, timeout: float
) -> None:
    """Not even what is there: it may be on its way still."""
    (tmp_path / "a").mkdir()
    assert store(tmp_path, told, stopping=stopping, timeout=timeout).find(["a"]) == []


def test_new_results_are_the_starters_affair(tmp_path: Path, told: list[Event]) -> None:
    store(tmp_path, told).put("a", lambda path: path.rmdir())
    assert list(tmp_path.iterdir()) == []
    assert told == []
