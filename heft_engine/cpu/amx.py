"""Linear layers, gated MLPs and attention in bfloat16 on Intel AMX: torch.ops.heft.amx_*, csrc/amx_*.cpp.

A library's product chooses the order of its sums by its shape, so that a row's bits depend on its batch, and it writes
to memory what the next operation reads again. Here every sum has one order whatever the number of rows or threads, and
what follows a product (bias, gated activation, residual) happens while its numbers are in registers. Attention takes
each query against its own keys from the first one on: its bits are the same whether its row is computed whole or
continues a cached prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

#: A weight's inputs and outputs are multiples of these; a head's width is one, up to the widest.
_INPUTS, _OUTPUTS, _HEAD, _WIDEST = 32, 16, 32, 256

T = TypeVar("T")
Three = tuple[T, T, T]
#: Keys and values, (tokens, kv_heads, head_dim) each; a head's numbers are contiguous.
Source = tuple[Tensor, Tensor]


class LoraDelta(NamedTuple):
    """Adds (x · downᵀ, rounded) · up to rows start … start + tokens − 1 of a product, before it is rounded.

    down (n, rank, in) and up (n, rank, out) are stacks, of which this is the one at `stack_index`. All of `up` must be
    finite: rows beside these get zero times it.
    """

    start: int
    tokens: int
    down: Tensor
    up: Tensor
    stack_index: int


class Norm(NamedTuple):
    """An RMSNorm as transformers' LlamaRMSNorm: weight (width,)."""

    weight: Tensor
    epsilon: float


class Projection(NamedTuple):
    """A linear layer: weight (out, in), its packed copy if there is one, bias (out,), LoRA deltas."""

    weight: Tensor
    packed: Tensor | None = None
    bias: Tensor | None = None
    lora_deltas: Sequence[LoraDelta] = ()


class Segments:
    """Sequences of a pass: consecutive queries, and the tokens that they attend to.

    `segments`: of each its first query, the number of queries, and pieces (source, first token, tokens) from the
    sequence's first token to its last query's own.
    """

    def __init__(self, segments: Sequence[tuple[int, int, Sequence[tuple[int, int, int]]]]) -> None:
        segments = [segment for segment in segments if segment[1]]
        first_pieces = itertools.accumulate((len(pieces) for *_, pieces in segments), initial=0)
        rows = [
            (first, count, first_piece, len(pieces))
            for (first, count, pieces), first_piece in zip(segments, first_pieces, strict=False)
        ]
        pieces = [piece for *_, pieces in segments for piece in pieces]
        self.segments = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
        self.pieces = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 3)


class AmxOps:
    """The AMX operators of a namespace of torch.ops, for bfloat16 tensors on a CPU. None has a gradient.

    Every product is summed in FP32 and rounded once. The operators raise RuntimeError for tensors of other types and
    shapes.
    """

    def __init__(self, namespace: Any) -> None:
        self._ops = namespace

    def supports(self, weight: Tensor) -> bool:
        """True for weights (out, in) that `pack` and the linear layers take."""
        return (
            weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and weight.shape[0] % _OUTPUTS == 0
            and weight.shape[1] % _INPUTS == 0
        )

    def supports_heads(self, heads: Tensor) -> bool:
        """True for queries, keys or values (…, head_dim) that `attention` takes."""
        width = heads.shape[-1]
        is_bf16_cpu = heads.dtype == torch.bfloat16 and heads.device.type == "cpu"
        return is_bf16_cpu and heads.stride(-1) == 1 and width % _HEAD == 0 and width <= _WIDEST

    def pack(self, weight: Tensor) -> Tensor:
        """Returns a weight (out, in) in VNNI tiles, for these operators alone. As many bytes."""
        return self._ops.amx_pack(weight)  # type: ignore[no-any-return]

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
        projection = Projection(weight, packed, bias, lora_deltas)
        return self._linears(x, None, [projection], [residual])[0]

    def norm_linears(self, x: Tensor, norm: Norm, projections: Sequence[Projection]) -> list[Tensor]:
        """norm(x) · weightᵀ + LoRA deltas + bias, rounded, of each projection: x (…, in) → (…, out) each."""
        return self._linears(x, norm, projections, [None] * len(projections))

    def _linears(
        self,
        x: Tensor,
        norm: Norm | None,
        projections: Sequence[Projection],
        residuals: Sequence[Tensor | None],
    ) -> list[Tensor]:
        return self._ops.amx_linears(  # type: ignore[no-any-return]
            x,
            *((None, 0.0) if norm is None else norm),
            weights=[p.weight if p.packed is None else p.packed for p in projections],
            is_packed=[p.packed is not None for p in projections],
            biases=[p.bias for p in projections],
            residuals=residuals,
            **_lora_arguments([p.lora_deltas for p in projections]),
        )

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm,
        weights: Three[Tensor],
        packed: Three[Tensor] | None,
        lora_deltas: Three[Sequence[LoraDelta]] = ((), (), ()),
    ) -> Tensor:
        """down(SiLU(gate(y)) · up(y)) + x with y = norm(x), every step rounded: x (…, width) → (…, width).

        weights: gate and up (inner, width), down (width, inner); `packed`: all of them or none. `lora_deltas`: of each.
        """
        gate, up, down = weights if packed is None else packed
        return self._ops.amx_gated_mlp(  # type: ignore[no-any-return]
            x, norm.weight, norm.epsilon, gate, up, down, packed is not None, **_lora_arguments(lora_deltas)
        )

    def attention(
        self,
        query: Tensor,
        sources: Sequence[Source],
        segments: Segments,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """softmax(scaling · q·kᵀ)·v, causal: query (T, heads, head_dim) → the same shape.

        The last of a segment's queries sees all of its tokens, each one before it a token less; `window` limits them.
        Results of queries in no segment are undefined. scaling None means 1/√head_dim.
        """
        keys, values = [key for key, _ in sources], [value for _, value in sources]
        return self._ops.amx_attention(  # type: ignore[no-any-return]
            query, keys, values, segments.segments, segments.pieces, scaling, window
        )


def _lora_arguments(deltas_of_linears: Sequence[Sequence[LoraDelta]]) -> dict[str, list[Any]]:
    """The operators' arguments for the LoRA deltas of each of their linear layers."""
    deltas = [(linear, delta) for linear, group in enumerate(deltas_of_linears) for delta in group]
    return {
        "lora_down": [delta.down for _, delta in deltas],
        "lora_up": [delta.up for _, delta in deltas],
        "lora_linear": [linear for linear, _ in deltas],
        "lora_start": [delta.start for _, delta in deltas],
        "lora_tokens": [delta.tokens for _, delta in deltas],
        "lora_index": [delta.stack_index for _, delta in deltas],
    }
