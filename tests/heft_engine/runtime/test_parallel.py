"""Threads of a pass: jobs and tasks, each on a thread that computes alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from needs import needs_runtime

from heft_engine.runtime import parallel
from heft_engine.runtime import threads as runtime_threads
from heft_engine.runtime.parallel import all_threads, job_threads, one_thread, run_jobs, run_tasks
from heft_engine.runtime.threads import torch_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_runtime
def test_jobs_run_side_by_side_each_with_one_thread() -> None:
    both = threading.Barrier(2, timeout=30)

    def job() -> tuple[str, int, int]:
        both.wait()
        return threading.current_thread().name, torch.get_num_threads(), job_threads(CPU)

    results = run_jobs([job, job], CPU)
    assert len({name for name, _, _ in results}) == 2
    assert [rest for _, *rest in results] == [[1, 1], [1, 1]], "a job's own jobs run one after another"
    assert torch.get_num_threads() == 3


@needs_runtime
def test_many_threads_are_divided_among_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(6)
    monkeypatch.setattr(parallel, "MOST_JOBS", 2)
    assert run_jobs([torch.get_num_threads] * 2, CPU) == [3, 3]


@needs_runtime
def test_an_exception_is_raised_when_all_jobs_have_ended() -> None:
    begun, ended = threading.Event(), threading.Event()

    def fail() -> None:
        begun.wait(30)
        raise KeyError("first")

    def go_on() -> None:
        begun.set()
        ended.wait(0.05)
        ended.set()

    with pytest.raises(KeyError, match="first"):
        run_jobs([fail, go_on], CPU)
    assert ended.is_set()


@needs_runtime
def test_jobs_that_have_not_begun_are_cancelled_when_one_fails() -> None:
    begun: list[int] = []

    def job(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise KeyError("first")
        threading.Event().wait(0.02)

    with pytest.raises(KeyError, match="first"):
        run_jobs([partial(job, number) for number in range(200)], CPU)
    assert len(begun) < 100


@needs_runtime
def test_one_job_stays_on_the_callers_thread() -> None:
    here = threading.current_thread()
    assert run_jobs([threading.current_thread], CPU) == [here]
    assert run_jobs([threading.current_thread] * 2, torch.device("meta")) == [here, here]


@needs_runtime
@torch.inference_mode()
def test_tasks_are_shared_by_all_threads_of_the_caller_each_with_one() -> None:
    all_here = threading.Barrier(3, timeout=30)
    seen: list[tuple[int, int, bool]] = []

    def task() -> None:
        all_here.wait()
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with one_thread():
        assert torch.get_num_threads() == 1
        run_tasks([task] * 3)
        with all_threads():
            assert torch.get_num_threads() == 3
    assert len({ident for ident, _, _ in seen}) == 3
    assert {rest for _, *rest in map(list, seen) for rest in [tuple(rest)]} == {(1, True)}


def test_outside_tasks_run_one_after_another() -> None:
    seen: list[int] = []
    run_tasks([partial(seen.append, number) for number in range(5)])
    assert seen == list(range(5))


@needs_runtime
def test_a_tasks_exception_is_raised() -> None:
    def fail() -> None:
        if threading.current_thread() is not here:
            raise KeyError("elsewhere")
        time.sleep(0.01)

    here = threading.current_thread()
    with one_thread(), pytest.raises(KeyError, match="elsewhere"):
        run_tasks([fail] * 50)


@needs_runtime
def test_a_threads_number_is_its_own() -> None:
    other: list[int] = []
    with torch_threads(1):
        assert torch.get_num_threads() == 1
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert torch.get_num_threads() == 3
    assert other == [3]


def test_without_control_over_openmp_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parallel, runtime_threads):
        monkeypatch.setattr(module, "openmp_runtime", lambda: None)
    assert job_threads(CPU) == 1
    with torch_threads(1), one_thread():
        assert torch.get_num_threads() == 3
