"""Stage results from the parent process: requested once, and waited for no longer than the timeout."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from heft_engine.commands.stage_exchange import ANSWERED, RequestedStages
from heft_engine.events import Event


@pytest.fixture
def events() -> list[Event]:
    return []


def store(
    tmp_path: Path, events: list[Event], *, stopping: bool = False, timeout: float = 60.0
) -> RequestedStages:
    return RequestedStages(
        directory=tmp_path, on_event=events.append, should_stop=lambda: stopping, timeout_seconds=timeout
    )


def test_results_that_arrive_while_it_waits_are_found(tmp_path: Path, events: list[Event]) -> None:
    def answer_request() -> None:
        for key in ("a", "b", "d"):
            (tmp_path / key).mkdir()
        (tmp_path / ANSWERED).touch()

    answer = threading.Timer(0.2, answer_request)
    answer.start()
    paths = store(tmp_path, events).find(["a", "b", "c", "d"])
    answer.join()
    assert paths == [tmp_path / "a", tmp_path / "b"], "up to the first that is missing"
    assert [(event.code, event.data) for event in events] == [("STAGE_KEYS", {"keys": ["a", "b", "c", "d"]})]


@pytest.mark.parametrize(("stopping", "timeout"), [(True, 60.0), (False, 0.1)])
def test_without_an_answer_nothing_is_found(
    tmp_path: Path, events: list[Event], stopping: bool, timeout: float
) -> None:
    """Existing results are not used either: they may still be incomplete."""
    (tmp_path / "a").mkdir()
    assert store(tmp_path, events, stopping=stopping, timeout=timeout).find(["a"]) == []


def test_new_results_are_stored_by_the_parent(tmp_path: Path, events: list[Event]) -> None:
    store(tmp_path, events).put("a", lambda path: path.rmdir())
    assert list(tmp_path.iterdir()) == []
    assert events == []
