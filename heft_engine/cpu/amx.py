"""Products and attention on a CPU's matrix units (Intel AMX), in bfloat16: csrc/amx_gemm.cpp.

A library's product chooses the order of its sums by its shape, so that a row's bits depend on what it is batched with
(heft_engine.model.batch_invariant), and it writes to memory what the next operation reads again. Here a number is
summed in one
order whatever the number of rows or threads, and what follows a product (a bias, a gated activation, the residual's
sum) happens while its numbers are at hand. Attention takes each query against its own keys, from the first one on: its
bits are the same whether its row is computed whole or continues a kept prefix.

`load` holds the products to torch's, to the bit, and attention to its formula (heft_engine.cpu.selftest).
It does NOT know layers, models or layouts.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

#: Inputs and outputs of a weight are multiples of these; a head's width is one, up to the widest.
_INS, _OUTS, _HEAD, _WIDEST = 32, 16, 32, 256
#: Rows of a chunk that are held between two products, at most: whole blocks.
_ROWS, _BLOCK = 256, 32

T = TypeVar("T")
Three = tuple[T, T, T]
#: Keys and values, (tokens, kv_heads, head_dim) each; a head's numbers stand side by side.
Source = tuple[Tensor, Tensor]


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


class AmxOps:
    """csrc/amx_gemm.cpp's functions for bfloat16 tensors on a CPU. None of them has a gradient.

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

    def supports(self, weight: Tensor) -> bool:
        """Whether there is a product for a weight (out, in)."""
        return (
            weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and weight.shape[0] % _OUTS == 0
            and weight.shape[1] % _INS == 0
        )

    def supports_heads(self, query: Tensor) -> bool:
        """Whether there is attention for such heads, query, key or value (…, head_dim)."""
        width = query.shape[-1]
        fits = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.stride(-1) == 1
        return fits and width % _HEAD == 0 and width <= _WIDEST

    def pack(self, weight: Tensor) -> Tensor:
        """A weight (out, in) in the units' order, for these functions alone. As many bytes."""
        fit(self.supports(weight), weight)
        packed = torch.empty_like(weight)
        self._library.heft_units_pack(_at(weight), _at(packed), weight.shape[1], weight.shape[0])
        return packed

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        packed: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        lora_deltas: Sequence[LoraDelta] = (),
    ) -> Tensor:
        """x (…, in) · weight (out, in)ᵀ + LoRA deltas + bias (out,), rounded; + residual (…, out), rounded."""
        outs, ins = weight.shape
        x = x.contiguous()
        shape = (*x.shape[:-1], outs)
        out, rows = x.new_empty(shape), x.numel() // ins
        fits = (
            x.shape[-1] == ins and self.supports(weight) and (packed is None or packed.shape == weight.shape)
        )
        fits = (
            fits and (bias is None or bias.shape == (outs,)) and (residual is None or residual.shape == shape)
        )
        fits = fits and all(each is None or is_plain(each) for each in (x, packed, bias, residual))
        fit(fits, x, weight, bias, residual)
        more, given = _table([lora_deltas], [(ins, outs)], rows), weight if packed is None else packed
        self._library.heft_units_product(
            *(_at(x), _at(given), packed is not None, _at(bias), _at(residual), more, len(lora_deltas)),
            *(_at(out), rows, ins, outs),
        )
        return out

    def norm_linears(self, states: Tensor, norm: Norm, projections: Sequence[Projection]) -> list[Tensor]:
        """norm(states) · weightᵀ + LoRA deltas + bias, rounded, of each projection: states (…, in) → (…, out)."""
        states = states.contiguous()
        ins = states.shape[-1]
        rows = states.numel() // ins
        fits = norm.weight.shape == (ins,) and is_plain(states) and is_plain(norm.weight)
        outs: list[Tensor] = []
        numbers: list[int] = []
        tables: list[Sequence[LoraDelta]] = []
        for one in projections:
            columns = one.weight.shape[0]
            fits = fits and self.supports(one.weight) and one.weight.shape[1] == ins
            fits = fits and (
                one.packed is None or (one.packed.shape == one.weight.shape and is_plain(one.packed))
            )
            fits = fits and (one.bias is None or (one.bias.shape == (columns,) and is_plain(one.bias)))
            fit(fits, states, norm.weight, one.weight, one.packed, one.bias)
            out = states.new_empty(*states.shape[:-1], columns)
            given, is_packed = (one.weight, 0) if one.packed is None else (one.packed, 1)
            bias = 0 if one.bias is None else one.bias.data_ptr()
            numbers += [given.data_ptr(), bias, is_packed, columns, out.data_ptr()]
            numbers += [sum(len(table) for table in tables), len(one.lora_deltas)]
            tables.append(one.lora_deltas)
            outs.append(out)
        more = _table(tables, [(ins, out.shape[-1]) for out in outs], rows)
        normed = states.new_empty(self._held(rows), ins)
        self._library.heft_units_projections(
            *(_at(states), _at(norm.weight), norm.epsilon, (ctypes.c_int64 * len(numbers))(*numbers)),
            *(len(outs), more, _at(normed), rows, ins),
        )
        return outs

    def gated_mlp(
        self,
        states: Tensor,
        norm: Norm,
        weights: Three[Tensor],
        packed: Three[Tensor] | None,
        lora_deltas: Three[Sequence[LoraDelta]] = ((), (), ()),
    ) -> Tensor:
        """(SiLU(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ + states with x = norm(states), each step of it rounded.

        states (…, width); weights: gate and up (inner, width), down (width, inner); `packed`, all or none.
        `lora_deltas`: to each of the three products.
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
            and all(map(self.supports, weights))
            and all(map(is_plain, (states, norm.weight, *(packed or ()))))
        )
        fits = fits and (
            packed is None or all(p.shape == w.shape for p, w in zip(packed, weights, strict=True))
        )
        fit(fits, states, norm.weight, gate, up, down)
        more = _table(lora_deltas, [(width, inner), (width, inner), (inner, width)], rows)
        normed, active = (states.new_empty(self._held(rows), size) for size in (width, inner))
        self._library.heft_units_gated(
            *(_at(states), _at(norm.weight), norm.epsilon, *map(_at, packed or weights), packed is not None),
            *(more, *map(len, lora_deltas), _at(out), _at(normed), _at(active), rows, width, inner),
        )
        return out

    def _held(self, rows: int) -> int:
        return min(-(-rows // _BLOCK) * _BLOCK, _ROWS)

    def attention(
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
            kv_heads > 0
            and heads % kv_heads == 0
            and self.supports_heads(query)
            and segments.queries <= tokens
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
        fit(fits and max(segments.tokens, default=0) < len(sources), query, *itertools.chain(*sources))
        out = torch.empty_like(query)
        self._library.heft_units_attend(
            *(_at(query), _at(segments.table), _at(segments.piece_table)),
            *((ctypes.c_int64 * len(numbers))(*numbers), _at(out), segments.count, heads, kv_heads, width),
            *(width**-0.5 if scaling is None else scaling, window or 0),
        )
        return out


def _table(lora_deltas: Sequence[Sequence[LoraDelta]], shapes: Sequence[tuple[int, int]], rows: int) -> Any:
    """All LoRA deltas' numbers, those to one product after another; its shape is (in, out)."""
    numbers = [
        number
        for each, (ins, outs) in zip(lora_deltas, shapes, strict=True)
        for one in each
        for number in one.numbers(ins, outs, rows)
    ]
    return (ctypes.c_int64 * len(numbers))(*numbers) if numbers else None


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
