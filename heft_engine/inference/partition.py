"""Divides the rows of a pass into parts that run side by side on the threads of a CPU.

A row's scores agree to rounding in any part, to the bit where passes are batch-invariant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, packed_length
from heft_engine.runtime.parallel import job_threads, run_jobs

#: Tokens of one part: on a GPU, and on one of a CPU's threads, whose activations stay in its cache.
TOKEN_BUDGET = 4_096
THREAD_TOKENS = 2_048

P = TypeVar("P")
R = TypeVar("R")


def partition(
    lm: PackedLM, examples: Sequence[Example], cached_tokens: Sequence[int] | None = None
) -> list[list[int]]:
    """Returns the indices of each part's rows.

    `cached_tokens`: of each row, those that need not be computed. Neighbours may share these, so they stay together.
    """
    sizes = [packed_length(example) for example in examples]
    threads = job_threads(lm.device)
    if threads > 1:
        shares_prefixes = cached_tokens is not None and any(cached_tokens)
        unread = [
            size - cached for size, cached in zip(sizes, cached_tokens or [0] * len(sizes), strict=True)
        ]
        parts = min(len(unread), threads * -(-sum(unread) // (threads * THREAD_TOKENS)))
        return cut(unread, parts) if shares_prefixes else deal(unread, parts)
    ends = list(itertools.accumulate(len(batch) for batch in micro_batches(examples, TOKEN_BUDGET)))
    return [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divides rows into at most `count` parts of about equal size: the largest row first, each to the smallest part."""
    parts: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        smallest = totals.index(min(totals))
        parts[smallest].append(row)
        totals[smallest] += sizes[row]
    return [sorted(part) for part in parts if part]


def cut(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divides rows into at most `count` parts of neighbours, of about equal size."""
    total, reached = sum(sizes), 0
    parts: list[list[int]] = [[]]
    for row, size in enumerate(sizes):
        # A part ends with the row that comes closest to its share.
        goal = total * len(parts) / count
        if parts[-1] and reached + size - goal > goal - reached and len(parts) < count:
            parts.append([])
        parts[-1].append(row)
        reached += size
    return parts


def run_parts(lm: PackedLM, work: Callable[[P], R], parts: Sequence[P]) -> list[R]:
    """Returns what `work` returns for each part, in order."""

    def job(part: P) -> R:
        with torch.inference_mode(), lm.inference_mode():
            return work(part)

    return run_jobs([partial(job, part) for part in parts], lm.device)


def in_row_order(parts: Sequence[Sequence[int]], results: Sequence[Sequence[R]]) -> list[R]:
    """Returns the rows' results in the order of the rows; `results` are those of each part's rows."""
    by_row: dict[int, R] = {}
    for rows, part_results in zip(parts, results, strict=True):
        by_row.update(zip(rows, part_results, strict=True))
    return [by_row[row] for row in range(len(by_row))]
