"""What stands between the products of a decoder layer, each in one pass over memory: csrc/fused_ops.cpp.

torch's own operations go over a pass's activations a dozen times between two products, and on a CPU with matrix units
that takes as long as the products. `load` holds each function to the operations it stands for, to the bit: a norm or an
activation is the same with the kernels and without. Where they can't be compiled (heft_engine.cpu.build), or give other
bits, there are none.

It does NOT know layers or models: tensors go in and come out.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


class FusedOps:
    """csrc/fused_ops.cpp's functions for bfloat16 tensors on a CPU. None of them has a gradient.

    What is changed in place must be contiguous. Raises ValueError for tensors of other kinds or shapes: the functions
    see addresses alone, and would write beyond them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        for name, arguments in {
            "heft_rms_norm": (*(pointer,) * 3, number, number, real),
            "heft_add_rms_norm": (*(pointer,) * 4, number, number, real),
            "heft_rotate": (*(pointer,) * 6, *(number,) * 4),
            "heft_place": (*(pointer,) * 4, *(number,) * 3),
            "heft_gate_silu": (pointer, pointer, number),
            "heft_logits": (*(pointer,) * 3, *(number,) * 3),
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x (…, width), weight (width,): as transformers' LlamaRMSNorm."""
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, width = _size(x)
        _agree(x, weight, out, fits=weight.shape == (width,))
        self._library.heft_rms_norm(_at(x), _at(weight), _at(out), rows, width, epsilon)
        return out

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """y += x, in place, and the norm of that; both (…, width)."""
        x, out = x.contiguous(), torch.empty_like(y)
        rows, width = _size(y)
        _agree(x, y, weight, out, fits=x.shape == y.shape and weight.shape == (width,))
        self._library.heft_add_rms_norm(_at(x), _at(y), _at(weight), _at(out), rows, width, epsilon)
        return out

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor, places: Tensor, gaps: Tensor) -> Tensor:
        """Rotary embedding of x (rows, heads, width), cosine and sine (rows, width), each row at its place.

        places (rows,) and gaps (n,), int64: where a row goes and where nothing is, all of 0 … rows + n − 1. Returns
        (rows + n, heads, width), zero at the gaps.
        """
        rows, heads, width = x.shape
        out = x.new_empty(rows + len(gaps), heads, width)
        fits = cosine.numel() == sine.numel() == rows * width and len(places) == rows
        _agree(x, cosine, sine, fits=fits)
        tensors = (x, cosine, sine, places, gaps, out)
        self._library.heft_rotate(*map(_at, tensors), rows, len(gaps), heads, width)
        return out

    def place(self, x: Tensor, places: Tensor, gaps: Tensor) -> Tensor:
        """x (rows, heads, width) as `rotate` places it, as it is."""
        out = x.new_empty(len(x) + len(gaps), *x.shape[1:])
        _agree(x, fits=len(places) == len(x))
        self._library.heft_place(*map(_at, (x, places, gaps, out)), len(x), len(gaps), x[0].numel())
        return out

    def gate_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) · up, in place of `gate`; both of one shape."""
        _agree(gate, up, fits=gate.shape == up.shape)
        self._library.heft_gate_silu(_at(gate), _at(up), gate.numel())
        return gate

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (rows, width) · weight (columns, width)ᵀ in float32, summed in one order: (rows, columns)."""
        (rows, width), columns = x.shape, len(weight)
        _agree(x := x.contiguous(), weight, fits=weight.shape == (columns, width))
        single, out = x.float(), x.new_empty(rows, columns, dtype=torch.float32)
        self._library.heft_logits(_at(single), _at(weight), _at(out), rows, width, columns)
        return out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As torch computes it: x (…, width), weight (width,)."""
    single = x.float()
    return weight * (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _size(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // width, width


def _agree(*tensors: Tensor, fits: bool) -> None:
    on_cpu = all(x.device.type == "cpu" for x in tensors)
    if not fits or not on_cpu or any(x.dtype != torch.bfloat16 or not x.is_contiguous() for x in tensors):
        described = [(tuple(x.shape), x.dtype, x.stride()) for x in tensors]
        raise ValueError(f"kernels take contiguous bfloat16 tensors that fit together, not {described}")


def _at(x: Tensor) -> int:
    return x.data_ptr()
