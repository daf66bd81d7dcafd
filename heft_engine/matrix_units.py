"""Products and attention on a CPU's matrix units (Intel AMX), in bfloat16: matrix_units.cpp.

A library's product chooses the order of its sums by its shape, so that a row's bits depend on what it is batched with
(heft_engine.fixed_shapes), and it writes to memory what the next operation reads again. Here a number is summed in one
order whatever the number of rows or threads, and what follows a product (a bias, a gated activation, the residual's
sum) happens while its numbers are at hand. Attention takes each query against its own keys, from the first one on: its
bits are the same whether its row is computed whole or continues a kept prefix.

`load` holds the products to torch's, to the bit, and attention to its formula. It does NOT know layers, models or
layouts.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from heft_engine import lanes, native
from heft_engine.kernels import rms_norm

log = logging.getLogger(__name__)

#: Inputs and outputs of a weight are multiples of these; a head's width is one, up to the widest.
_INS, _OUTS, _HEAD, _WIDEST = 32, 16, 32, 256
#: Numbers that SiLU is tried with at a time.
_GROUP = 255
#: Rows of a chunk that are held between two products, at most: whole blocks.
_ROWS, _BLOCK = 256, 32

T = TypeVar("T")
Three = tuple[T, T, T]
#: Keys and values, (tokens, kv_heads, head_dim) each; a head's numbers stand side by side.
Source = tuple[Tensor, Tensor]


class Addition(NamedTuple):
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
        """As matrix_units.cpp takes it. Raises ValueError where it does not fit the product."""
        count, rank, width = self.down.shape
        fits = width == ins and self.up.shape == (count, rank, outs) and 0 <= self.place < count
        fits = fits and self.start >= 0 and self.start + self.tokens <= rows
        fits = fits and all(map(_is_plain, (self.down, self.up)))
        _fit(fits, self.down, self.up)
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
    additions: Sequence[Addition] = ()


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


class MatrixUnits:
    """matrix_units.cpp's functions for bfloat16 tensors on a CPU. None of them has a gradient.

    They raise ValueError for tensors of other kinds or shapes: the functions see addresses alone.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, real, switch = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
        for name, arguments in {
            "heft_units_pack": (pointer, pointer, number, number),
            "heft_units_product": (
                *(pointer, pointer, switch),
                *(*(pointer,) * 3, number, pointer, number, number, number),
            ),
            "heft_units_projections": (
                pointer,
                pointer,
                real,
                pointer,
                number,
                *(pointer,) * 2,
                number,
                number,
            ),
            "heft_units_gated": (
                *(pointer, pointer, real, *(pointer,) * 3, switch),
                *(pointer, *(number,) * 3, *(pointer,) * 3, *(number,) * 3),
            ),
            "heft_units_attend": (*(pointer,) * 5, *(number,) * 4, real, number),
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def takes(self, weight: Tensor) -> bool:
        """Whether there is a product for a weight (out, in)."""
        return (
            weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and weight.shape[0] % _OUTS == 0
            and weight.shape[1] % _INS == 0
        )

    def takes_heads(self, query: Tensor) -> bool:
        """Whether there is attention for such heads, query, key or value (…, head_dim)."""
        width = query.shape[-1]
        on_units = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.stride(-1) == 1
        return on_units and width % _HEAD == 0 and width <= _WIDEST

    def packed(self, weight: Tensor) -> Tensor:
        """A weight (out, in) in the units' order, for these functions alone. As many bytes."""
        _fit(self.takes(weight), weight)
        packed = torch.empty_like(weight)
        self._library.heft_units_pack(_at(weight), _at(packed), weight.shape[1], weight.shape[0])
        return packed

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        packed: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        additions: Sequence[Addition] = (),
    ) -> Tensor:
        """x (…, in) · weight (out, in)ᵀ + additions + bias (out,), rounded, + residual (…, out), rounded → (…, out)."""
        outs, ins = weight.shape
        x = x.contiguous()
        shape = (*x.shape[:-1], outs)
        out, rows = x.new_empty(shape), x.numel() // ins
        fits = x.shape[-1] == ins and self.takes(weight) and (packed is None or packed.shape == weight.shape)
        fits = (
            fits and (bias is None or bias.shape == (outs,)) and (residual is None or residual.shape == shape)
        )
        fits = fits and all(each is None or _is_plain(each) for each in (x, packed, bias, residual))
        _fit(fits, x, weight, bias, residual)
        more, given = _table([additions], [(ins, outs)], rows), weight if packed is None else packed
        self._library.heft_units_product(
            *(_at(x), _at(given), packed is not None, _at(bias), _at(residual), more, len(additions)),
            *(_at(out), rows, ins, outs),
        )
        return out

    def projections(self, states: Tensor, norm: Norm, projections: Sequence[Projection]) -> list[Tensor]:
        """norm(states) · weightᵀ + additions + bias, rounded, of each projection: states (…, in) → (…, out)."""
        states = states.contiguous()
        ins = states.shape[-1]
        rows = states.numel() // ins
        fits = norm.weight.shape == (ins,) and _is_plain(states) and _is_plain(norm.weight)
        outs: list[Tensor] = []
        numbers: list[int] = []
        tables: list[Sequence[Addition]] = []
        for one in projections:
            columns = one.weight.shape[0]
            fits = fits and self.takes(one.weight) and one.weight.shape[1] == ins
            fits = fits and (
                one.packed is None or (one.packed.shape == one.weight.shape and _is_plain(one.packed))
            )
            fits = fits and (one.bias is None or (one.bias.shape == (columns,) and _is_plain(one.bias)))
            _fit(fits, states, norm.weight, one.weight, one.packed, one.bias)
            out = states.new_empty(*states.shape[:-1], columns)
            given, is_packed = (one.weight, 0) if one.packed is None else (one.packed, 1)
            bias = 0 if one.bias is None else one.bias.data_ptr()
            numbers += [given.data_ptr(), bias, is_packed, columns, out.data_ptr()]
            numbers += [sum(len(table) for table in tables), len(one.additions)]
            tables.append(one.additions)
            outs.append(out)
        more = _table(tables, [(ins, out.shape[-1]) for out in outs], rows)
        normed = states.new_empty(self._held(rows), ins)
        self._library.heft_units_projections(
            *(_at(states), _at(norm.weight), norm.epsilon, (ctypes.c_int64 * len(numbers))(*numbers)),
            *(len(outs), more, _at(normed), rows, ins),
        )
        return outs

    def gated(
        self,
        states: Tensor,
        norm: Norm,
        weights: Three[Tensor],
        packed: Three[Tensor] | None,
        additions: Three[Sequence[Addition]] = ((), (), ()),
    ) -> Tensor:
        """(SiLU(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ + states with x = norm(states), each step of it rounded.

        states (…, width); weights: gate and up (inner, width), down (width, inner); `packed`, all or none.
        `additions`: to each of the three products.
        """
        gate, up, down = weights
        inner, width = gate.shape
        states = states.contiguous()
        out, rows = torch.empty_like(states), states.numel() // width
        fits = up.shape == gate.shape == down.shape[::-1] and norm.weight.shape == states.shape[-1:] == (
            width,
        )
        fits = (
            fits
            and all(map(self.takes, weights))
            and all(map(_is_plain, (states, norm.weight, *(packed or ()))))
        )
        fits = fits and (
            packed is None or all(p.shape == w.shape for p, w in zip(packed, weights, strict=True))
        )
        _fit(fits, states, norm.weight, gate, up, down)
        more = _table(additions, [(width, inner), (width, inner), (inner, width)], rows)
        normed, active = (states.new_empty(self._held(rows), size) for size in (width, inner))
        self._library.heft_units_gated(
            *(_at(states), _at(norm.weight), norm.epsilon, *map(_at, packed or weights), packed is not None),
            *(more, *map(len, additions), _at(out), _at(normed), _at(active), rows, width, inner),
        )
        return out

    def _held(self, rows: int) -> int:
        return min(-(-rows // _BLOCK) * _BLOCK, _ROWS)

    def attend(
        self,
        query: Tensor,
        sources: Sequence[Source],
        segments: Segments,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """softmax(scaling · q·kᵀ)·v, causal: query (T, heads, head_dim) → the same shape.

        Query i of the last n tokens of its sequence sees what is left of it and itself, `window` tokens in all if there
        is one. Of T, what no segment has is undefined. scaling None means 1/√head_dim.
        """
        query = query.contiguous()
        tokens, heads, width = query.shape
        kv_heads = sources[0][0].shape[1] if sources else 0
        fits = (
            kv_heads > 0 and heads % kv_heads == 0 and self.takes_heads(query) and segments.queries <= tokens
        )
        fits = fits and (window is None or window > 0)
        numbers: list[int] = []
        for index, (keys, values) in enumerate(sources):
            fits = fits and keys.shape == values.shape and keys.shape[1:] == (kv_heads, width)
            fits = (
                fits and keys.stride(2) == values.stride(2) == 1 and keys.dtype == values.dtype == query.dtype
            )
            fits = fits and segments.tokens.get(index, 0) <= len(keys)
            numbers += (keys.data_ptr(), values.data_ptr(), *keys.stride()[:2], *values.stride()[:2])
        _fit(fits and max(segments.tokens, default=0) < len(sources), query, *itertools.chain(*sources))
        out = torch.empty_like(query)
        self._library.heft_units_attend(
            *(_at(query), _at(segments.table), _at(segments.piece_table)),
            *((ctypes.c_int64 * len(numbers))(*numbers), _at(out), segments.count, heads, kv_heads, width),
            *(width**-0.5 if scaling is None else scaling, window or 0),
        )
        return out


@lru_cache(maxsize=1)
def load(cache_dir: Path | None = None) -> MatrixUnits | None:
    """The units' functions, tried out; None where the processor has no units or nothing can be compiled.

    `cache_dir` None means the user's own cache.
    """
    library = native.library(cache_dir)
    if library is None or not getattr(library, "heft_units_ready", lambda: 0)():
        return None
    units = MatrixUnits(library)
    wrong = _wrong(units)
    if wrong:
        log.info("the matrix units are left to torch: %s gives other bits here", wrong)
        return None
    return units


@torch.inference_mode()
def _wrong(units: MatrixUnits) -> str | None:
    """The name of the first function that does not give what it should, if there is one."""
    made = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).bfloat16()

    # More rows than one chunk has, and a width that is multiplied in two parts.
    rows, width, inner = 289, 640, 160
    x, residual, bias = some(rows, width), some(rows, inner), some(inner)
    gate, up, down = some(inner, width), some(inner, width), some(width, inner)
    norm = Norm(some(width), 1e-5)
    normed = rms_norm(x, *norm)
    for packed in (None, units.packed(gate)):
        if not torch.equal(units.product(x, gate, packed), _product(x, gate)):
            return "a product"
        if not torch.equal(units.product(x, gate, packed, bias), _product(x, gate, bias)):
            return "a product with a bias"
        if not torch.equal(units.product(x, gate, packed, None, residual), _product(x, gate).add_(residual)):
            return "a product and a sum"
        found = units.projections(x, norm, [Projection(up), Projection(gate, packed, bias)])
        if not all(map(torch.equal, found, (_product(normed, up), _product(normed, gate, bias)))):
            return "a product of normed states"
    # One thread: several leave torch rests, which it rounds otherwise.
    with lanes.computing_with(1):
        expected = _product(F.silu(_product(normed, gate)) * _product(normed, up), down) + x
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        # In the units, what is smaller than 2⁻¹²⁶ counts as zero.
        numbers = every[every.isfinite() & ((every.abs() >= 2.0**-125) | (every == 0))]
        others = torch.tensor([torch.nan, torch.inf, -torch.inf]).bfloat16()
        activations = F.silu(torch.cat([numbers, others]))
    all_packed = (units.packed(gate), units.packed(up), units.packed(down))
    for chosen in (None, all_packed):
        if not torch.equal(units.gated(x, norm, (gate, up, down), chosen), expected):
            return "a gated activation"
    if not _adds(units, some):
        return "an adapter's addition"
    groups = (*torch.split(numbers, _GROUP), *torch.split(others, 1))
    if not torch.allclose(_activated(units, groups), activations, rtol=0, atol=0, equal_nan=True):
        return "SiLU"
    return None if _attends(units, some) else "attention"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """By torch, 32 rows at a time: it sums such products in the units' order."""
    rows = F.pad(x, (0, 0, 0, -len(x) % 32))
    return torch.cat([F.linear(part, weight, bias) for part in torch.split(rows, 32)])[: len(x)]


def _activated(units: MatrixUnits, groups: Iterable[Tensor]) -> Tensor:
    """SiLU of each number of groups up to _GROUP, as `gated` computes it."""
    # The norm makes a 1 and zeros of the one row, so that the gate's first column is what comes out of its product.
    width = _GROUP + 1
    row, weight = torch.zeros(1, width).bfloat16(), torch.full((width,), width**-0.5).bfloat16()
    row[0, 0] = 1
    found = []
    for group in groups:
        gate, up, down = torch.zeros(3, width, width).bfloat16()
        gate[: len(group), 0], up[:, 0] = group, 1
        # What comes out where the row itself is zero.
        down[1:, :-1].fill_diagonal_(1)
        found.append(units.gated(row, Norm(weight, 0.0), (gate, up, down), None)[0, 1 : len(group) + 1])
    return torch.cat(found)


def _adds(units: MatrixUnits, some: Callable[..., Tensor]) -> bool:
    """Whether additions are those of their rows alone, wherever these stand, and what they should be."""
    rows, ins, outs = 90, 640, 48
    x, weight = some(rows, ins), some(outs, ins)
    factors = [(some(2, rank, ins), some(2, rank, outs)) for rank in (8, 40)]
    places = [(3, 30, 0), (40, 45, 1)]
    additions = [Addition(start, count, *factors[i], 1) for start, count, i in places]
    together = units.product(x, weight, additions=additions)
    untouched = torch.ones(rows, dtype=torch.bool)
    for addition in additions:
        own = slice(addition.start, addition.start + addition.tokens)
        untouched[own] = False
        alone = addition._replace(start=0)
        if not torch.equal(units.product(x[own], weight, additions=[alone]), together[own]):
            return False
        down, up = addition.down[1], addition.up[1]
        low = (x[own].float() @ down.float().T).bfloat16().float()
        exact = x[own].float() @ weight.float().T + low @ up.float()
        if not (together[own] - exact).abs().max() <= exact.abs().max() * 2.0**-7:
            return False
    return torch.equal(together[untouched], _product(x, weight)[untouched])


def _attends(units: MatrixUnits, some: Callable[..., Tensor]) -> bool:
    """Whether attention is what its formula says, and a query's the same behind a kept prefix."""
    tokens, left, heads, kv_heads, width = 75, 41, 4, 2, 64
    query, keys, values = (
        some(tokens, heads, width),
        some(tokens, kv_heads, width),
        some(tokens, kv_heads, width),
    )
    positions = torch.arange(tokens)
    for window in (None, 20):
        whole = units.attend(query, [(keys, values)], Segments([(0, tokens, [(0, 0, tokens)])]), None, window)
        behind = units.attend(
            query[left:].contiguous(),
            [(keys[left:], values[left:]), (keys[:left], values[:left])],
            Segments([(0, tokens - left, [(1, 0, left), (0, 0, tokens - left)])]),
            None,
            window,
        )
        distance = positions[:, None] - positions
        mask = (distance >= 0) & (distance < (window or tokens))
        q, k, v = (each.float().transpose(0, 1) for each in (query, keys, values))
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
        # Shares and results are rounded to bfloat16: 2⁻⁹ of the largest value that is summed, twice.
        is_close = (whole - exact).abs().max() <= values.abs().max() * 2.0**-8
        if not is_close or not torch.equal(behind, whole[left:]):
            return False
    return True


def _fit(fits: bool, *tensors: Tensor | None) -> None:
    if not fits:
        described = [(tuple(x.shape), x.dtype, x.stride()) for x in tensors if x is not None]
        raise ValueError(f"matrix units take bfloat16 tensors on a CPU that fit together, not {described}")


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.is_contiguous() and x.device.type == "cpu" and not x.is_mkldnn


def _table(additions: Sequence[Sequence[Addition]], shapes: Sequence[tuple[int, int]], rows: int) -> Any:
    """All additions' numbers, those to one product after another; its shape is (in, out)."""
    numbers = [
        number
        for each, (ins, outs) in zip(additions, shapes, strict=True)
        for one in each
        for number in one.numbers(ins, outs, rows)
    ]
    return (ctypes.c_int64 * len(numbers))(*numbers) if numbers else None


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
