"""What heft_engine.cpu.amx is given beside plain tensors: norms, LoRA deltas, sequences to attend in.

It does NOT know what is done with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoraDelta(NamedTuple):
    """What a low-rank adapter adds to rows start … start + tokens − 1 of a product: (x · downᵀ, rounded) · up.

    down (n, rank, in), up (n, rank, out), of which it is the one at `place`. All of `up` is finite: the rows beside
    these get zero times it.
    """

    start: int
    tokens: int
    down: Tensor
    up: Tensor
    place: int

    def numbers(self, ins: int, outs: int, rows: int) -> tuple[int, ...]:
        """As csrc/amx_gemm.cpp takes it. Raises ValueError where it does not fit the product."""
        count, rank, width = self.down.shape
        fits = width == ins and self.up.shape == (count, rank, outs) and 0 <= self.place < count
        fits = fits and self.start >= 0 and self.start + self.tokens <= rows
        fits = fits and all(map(is_plain, (self.down, self.up)))
        fit(fits, self.down, self.up)
        # Addresses, not views: these would take longer to make than the product.
        down = self.down.data_ptr() + self.place * rank * ins * self.down.element_size()
        up = self.up.data_ptr() + self.place * rank * outs * self.up.element_size()
        return self.start, self.tokens, down, up, rank


class Norm(NamedTuple):
    """weight · (x / √(mean(x²) + ε) rounded), as transformers' LlamaRMSNorm: weight (width,)."""

    weight: Tensor
    epsilon: float


class Projection(NamedTuple):
    """A product of normed states: weight (out, in), packed or not, bias (out,)."""

    weight: Tensor
    packed: Tensor | None = None
    bias: Tensor | None = None
    lora_deltas: Sequence[LoraDelta] = ()


class Segments:
    """Sequences of a pass: neighbouring queries, and what they attend to.

    `segments`: of each, its first query, how many, and pieces from the sequence's first token to its last query's own:
    (source, first token, tokens).
    """

    def __init__(self, segments: Sequence[tuple[int, int, Sequence[tuple[int, int, int]]]]) -> None:
        held = [segment for segment in segments if segment[1]]
        self.pieces = [piece for _, _, pieces in held for piece in pieces]
        firsts = [0, *itertools.accumulate(len(pieces) for _, _, pieces in held)]
        rows = [
            (first, count, start, len(pieces))
            for (first, count, pieces), start in zip(held, firsts, strict=False)
        ]
        if any(sum(tokens for *_, tokens in pieces) < count for _, count, pieces in held):
            raise ValueError("a sequence has more queries than tokens")
        if any(first < 0 for first, *_ in segments) or any(min(piece) < 0 for piece in self.pieces):
            raise ValueError("a sequence begins before its pass or its source")
        self.count = len(held)
        self.queries = max((first + count for first, count, _ in held), default=0)
        #: Tokens that each source must have.
        self.tokens: dict[int, int] = {}
        for source, start, tokens in self.pieces:
            self.tokens[source] = max(self.tokens.get(source, 0), start + tokens)
        self.table = torch.tensor(rows, dtype=torch.int64)
        self.piece_table = torch.tensor(self.pieces, dtype=torch.int64)


def fit(fits: bool, *tensors: Tensor | None) -> None:
    """Raises ValueError unless they do."""
    if not fits:
        described = [(tuple(x.shape), x.dtype, x.stride()) for x in tensors if x is not None]
        raise ValueError(f"matrix units take bfloat16 tensors on a CPU that fit together, not {described}")


def is_plain(x: Tensor) -> bool:
    """Whether the units can be given its address alone."""
    return x.dtype == torch.bfloat16 and x.is_contiguous() and x.device.type == "cpu" and not x.is_mkldnn
