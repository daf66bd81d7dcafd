"""Parts of a pass side by side: dealt out evenly, each on a thread that computes alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from needs import needs_runtime

from heft_engine.data.encoding import Example
from heft_engine.inference import scoring
from heft_engine.inference.scoring import score
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime import parallel
from heft_engine.runtime import threads as runtime_threads
from heft_engine.runtime.threads import torch_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 12))
def test_every_row_is_dealt_out_once_and_evenly(sizes: list[int], count: int) -> None:
    whole = list(range(len(sizes)))
    for share_out in (parallel.deal, parallel.cut):
        found = share_out(sizes, count)
        assert sorted(row for piece in found for row in piece) == whole
        assert all(piece == sorted(piece) for piece in found)
        assert all(found)
        assert len(found) <= count
        held = [sum(sizes[row] for row in piece) for piece in found]
        assert max(held) <= sum(sizes) / count + 2 * max(sizes)
    assert [row for piece in parallel.cut(sizes, count) for row in piece] == whole


def test_equal_rows_make_equal_pieces() -> None:
    assert parallel.cut([100] * 30, 2) == [list(range(15)), list(range(15, 30))]
    assert [len(piece) for piece in parallel.deal([100] * 30, 4)] == [8, 8, 7, 7]
    assert parallel.deal([90, 10, 50, 50], 2) == [[0, 1], [2, 3]]
    assert [parallel.pieces(sizes, 2, 800) for sizes in ([100] * 8, [100] * 17, [5_000], [1, 1, 1])] == [
        2,
        4,
        1,
        2,
    ]


@needs_runtime
def test_jobs_run_side_by_side_each_with_one_thread() -> None:
    both = threading.Barrier(2, timeout=30)

    def job() -> tuple[str, int, int]:
        both.wait()
        return threading.current_thread().name, torch.get_num_threads(), parallel.count(CPU)

    found = parallel.run([job, job], CPU)
    assert len({name for name, _, _ in found}) == 2
    assert [rest for _, *rest in found] == [[1, 1], [1, 1]], "and a lane deals nothing out"
    assert torch.get_num_threads() == 3


@needs_runtime
def test_many_threads_are_divided_among_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MOST", 1)
    monkeypatch.setattr(parallel, "count", lambda device: 2)
    assert parallel.threads_of_a_lane() == 3
    assert parallel.run([torch.get_num_threads] * 2, CPU) == [3, 3]


@needs_runtime
def test_what_goes_wrong_is_raised_when_all_have_ended() -> None:
    begun, ended = threading.Event(), threading.Event()

    def fails() -> None:
        begun.wait(30)
        raise KeyError("first")

    def goes_on() -> None:
        begun.set()
        ended.wait(0.05)
        ended.set()

    with pytest.raises(KeyError, match="first"):
        parallel.run([fails, goes_on], CPU)
    assert ended.is_set()


@needs_runtime
def test_what_has_not_begun_is_left_when_one_fails() -> None:
    begun: list[int] = []

    def job(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise KeyError("first")
        threading.Event().wait(0.02)

    with pytest.raises(KeyError, match="first"):
        parallel.run([partial(job, number) for number in range(200)], CPU)
    assert len(begun) < 100


@needs_runtime
def test_one_job_stays_here_unless_it_must_not() -> None:
    here = threading.current_thread()
    assert parallel.run([threading.current_thread], CPU) == [here]
    assert parallel.run([threading.current_thread], CPU, alone=False) != [here]
    assert parallel.run([threading.current_thread] * 2, torch.device("meta")) == [here, here]


@needs_runtime
def test_a_thread_computes_with_fewer_for_a_while_and_no_other_does() -> None:
    other: list[int] = []
    with torch_threads(1):
        assert torch.get_num_threads() == 1
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert torch.get_num_threads() == 3
    assert other == [3]


def test_without_a_runtime_of_torchs_nothing_is_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "openmp_runtime", lambda: None)
    monkeypatch.setattr(runtime_threads, "openmp_runtime", lambda: None)
    assert parallel.count(CPU) == 1
    with torch_threads(1):
        assert torch.get_num_threads() == 3


@needs_runtime
@pytest.mark.parametrize("is_alike", [True, False])
def test_a_row_alone_goes_where_it_gets_the_bits_of_all(
    make_tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, is_alike: bool
) -> None:
    """With all threads, where their products round as a lane's do; into a lane otherwise."""
    base = resolve_path(make_tiny_model("llama"))
    lm = PackedLM(load_model(base, dtype=torch.bfloat16, attention=IMPLEMENTATION))
    rows = [
        Example(prompt=(5,) * n, answers=((7,), (8,)), labels=("a", "b"), gold=0) for n in (9, 60, 33, 41)
    ]
    lm.fixed_shapes().is_alike = is_alike
    seen: list[int] = []
    monkeypatch.setattr(lm, "on_forward", lambda: seen.append(torch.get_num_threads()))
    together = score(lm, rows)
    assert len(seen) == 3, "three lanes"
    assert set(seen) == {1}
    seen.clear()
    assert [score(lm, [row])[0] for row in rows] == together
    assert set(seen) == {3 if is_alike else 1}


@needs_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_score_is_the_same_with_any_number_of_threads(
    make_tiny_model: Callable[[str], Path], dtype: torch.dtype
) -> None:
    """A job is evaluated beside other trainers, and served by a worker that has the machine to itself."""
    chance = random.Random(4)
    rows = [
        Example(
            prompt=tuple(chance.randrange(5, 600) for _ in range(length)),
            answers=((7,), (8,)),
            labels=("a", "b"),
            gold=0,
        )
        for length in (9, 60, 33, 41, 88, 12, 70)
    ]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        base = resolve_path(make_tiny_model("llama"))
        lm = PackedLM(load_model(base, dtype=dtype, attention=IMPLEMENTATION))
        found.append([one.totals for one in score(lm, rows)])
    assert found[0] == found[1] == found[2]


@needs_runtime
def test_a_lane_takes_no_more_than_its_cache_holds(
    make_tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve_path(make_tiny_model("llama"))
    lm = PackedLM(load_model(base, dtype=torch.float32, attention=IMPLEMENTATION))
    rows = [Example(prompt=(5,) * 40, answers=((7,), (8,)), labels=("a", "b"), gold=0)] * 30
    monkeypatch.setattr(scoring, "LANE_TOKENS", 100)
    assert [len(piece) for piece in scoring.pieces(lm, rows)] == [3] * 6 + [2] * 6
    assert len({one.totals for one in score(lm, rows)}) == 1
