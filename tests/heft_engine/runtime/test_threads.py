"""Work in a thread that ends with it."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest

from heft_engine.runtime.threads import run_in_short_lived_thread

REQUEST: ContextVar[str] = ContextVar("request", default="none")


def test_the_thread_is_gone_and_its_result_is_here() -> None:
    thread = run_in_short_lived_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_what_goes_wrong_is_the_callers() -> None:
    def fail() -> None:
        raise LookupError("of the call")

    with pytest.raises(LookupError, match="of the call"):
        run_in_short_lived_thread(fail)


def test_logs_know_whose_work_it_is() -> None:
    before = REQUEST.set("req-1")
    try:
        assert run_in_short_lived_thread(REQUEST.get) == "req-1"
    finally:
        REQUEST.reset(before)
