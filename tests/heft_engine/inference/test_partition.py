"""Partition of rows into passes: every row is in one part, and parts are of about equal size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from needs import needs_runtime

from heft_engine.data.encoding import Example
from heft_engine.inference import partition as parts
from heft_engine.inference.partition import cut, deal, in_row_order, partition
from heft_engine.model.packed_lm import PackedLM


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 12))
def test_every_row_is_in_one_part_and_parts_are_even(sizes: list[int], count: int) -> None:
    rows = list(range(len(sizes)))
    for divide in (deal, cut):
        divided = divide(sizes, count)
        assert sorted(row for part in divided for row in part) == rows
        assert all(part == sorted(part) for part in divided)
        assert all(divided)
        assert len(divided) <= count
        assert max(sum(sizes[row] for row in part) for part in divided) <= sum(sizes) / count + 2 * max(sizes)
    assert [row for part in cut(sizes, count) for row in part] == rows


def test_equal_rows_make_equal_parts() -> None:
    assert cut([100] * 30, 2) == [list(range(15)), list(range(15, 30))]
    assert [len(part) for part in deal([100] * 30, 4)] == [8, 8, 7, 7]
    assert deal([90, 10, 50, 50], 2) == [[0, 1], [2, 3]]


class Model:
    device = torch.device("cpu")


@needs_runtime
@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [([40] * 30, [3] * 6 + [2] * 6), ([40] * 4, [2, 2]), ([5_000], [1]), ([2, 2, 2], [2, 1])],
)
def test_a_part_is_no_larger_than_a_threads_cache_holds(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], sizes: list[int]
) -> None:
    monkeypatch.setattr(parts, "THREAD_TOKENS", 100)
    monkeypatch.setattr(parts, "job_threads", lambda device: 2)
    rows = [Example(prompt=(5,) * n, answers=((7,), (8,)), labels=("a", "b"), gold=0) for n in lengths]
    lm: PackedLM = Model()  # type: ignore[assignment]
    assert sorted(len(part) for part in partition(lm, rows)) == sorted(sizes)
    neighbours = partition(lm, rows, [1] * len(rows))
    assert [row for part in neighbours for row in part] == list(range(len(rows)))


def test_results_come_in_the_order_of_the_rows() -> None:
    assert in_row_order([[1, 3], [0, 2]], [["b", "d"], ["a", "c"]]) == ["a", "b", "c", "d"]
