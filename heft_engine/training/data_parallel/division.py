"""The division of a stage's rows among its ranks. Every rank computes the same one, from the rows' lengths alone."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.forward_pass import ForwardPass


@dataclass(frozen=True)
class Division:
    """Rows among `ranks`. lengths: of all rows, in tokens.

    Rows that run whole are divided anew in every step, balanced by tokens. Rows with cached activations are `fixed`:
    each stays with one rank, which alone computes and holds its activations. So the prefill and its memory are divided
    evenly, and steps only on average.
    """

    lengths: Sequence[int]
    ranks: int
    fixed: bool

    def of(self, rows: Sequence[int]) -> list[list[int]]:
        """Returns each rank's share of some rows, in their order. A share may be empty."""
        if self.ranks == 1:
            return [list(rows)]
        if self.fixed:
            return [[row for row in rows if self._owners[row] == rank] for rank in range(self.ranks)]
        places = balanced([self.lengths[row] for row in rows], self.ranks)
        return [[rows[place] for place in share] for share in places]

    def held(self, rank: int) -> list[int]:
        """Returns the rows that a rank may run: all of them, or those that stay with it."""
        rows = range(len(self.lengths))
        return self.of(rows)[rank] if self.fixed else list(rows)

    @cached_property
    def _owners(self) -> dict[int, int]:
        shares = balanced(self.lengths, self.ranks)
        return {row: rank for rank, share in enumerate(shares) for row in share}


def balanced(weights: Sequence[int], shares: int) -> list[list[int]]:
    """Returns the indices of `weights` in `shares` parts of about equal weight, each in ascending order.

    The longest-processing-time rule (Graham 1969): the heaviest first, each to the lightest part so far.
    """
    parts: list[list[int]] = [[] for _ in range(shares)]
    totals = [(0, part) for part in range(shares)]
    for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        total, part = totals[0]
        parts[part].append(index)
        heapq.heapreplace(totals, (total + weights[index], part))
    return [sorted(part) for part in parts]


@dataclass(frozen=True, kw_only=True)
class SharedPass:
    """A ForwardPass over all examples of which this rank runs its share.

    forward: of the rows that it holds. places: of these rows in `forward`.
    """

    forward: ForwardPass
    examples: Sequence[Example]
    division: Division
    rank: int
    places: Mapping[int, int]

    @property
    def lm(self) -> PackedLM:
        return self.forward.lm

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        return self.division.of(rows)[self.rank]

    def tokens(self, index: int) -> int:
        return self.forward.tokens(self.places[index])

    def hidden(self, indices: Sequence[int]) -> Tensor:
        return self.forward.hidden([self.places[index] for index in indices])
