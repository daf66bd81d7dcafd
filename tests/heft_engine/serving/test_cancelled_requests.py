"""Waits for an answer whose request may be cancelled."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future

import pytest

from heft_engine.inference.scoring import Scores
from heft_engine.serving import batcher
from heft_engine.serving.batcher import wait

SCORES = [Scores(totals=(0.0,), means=(0.0,))]


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "_POLL_SECONDS", 0.001)


class Late(Future[list[Scores]]):
    """A future that is done just after the first wait for it timed out."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__()
        self._fault = fault

    def result(self, timeout: float | None = None) -> list[Scores]:
        try:
            return super().result(timeout)
        except TimeoutError:
            if not self.done() and self._fault is None:
                self.set_result(SCORES)
            elif not self.done():
                self.set_exception(self._fault)
            raise


def test_an_answer_that_comes_while_one_looks_is_the_answer() -> None:
    assert wait(Late(), lambda: True) == SCORES


def test_the_timeout_error_of_a_pass_is_raised() -> None:
    with pytest.raises(TimeoutError, match="of the pass"):
        wait(Late(TimeoutError("of the pass")), lambda: True)


def test_an_unwanted_answer_is_cancelled() -> None:
    future: Future[list[Scores]] = Future()
    answers = iter([True, True, False])
    with pytest.raises(CancelledError):
        wait(future, lambda: next(answers))
    assert future.cancelled()
