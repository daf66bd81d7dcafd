"""Operators between the products of a decoder layer, each in one pass over memory: csrc/fused_ops.cpp.

torch's own operations go over a pass's activations a dozen times between two products, and on a CPU with AMX that takes
as long as the products. Each operator but `logits` has the bits of the operations that it replaces
(heft_engine.cpu.selftest).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class FusedOps:
    """The fused operators of a namespace of torch.ops, for bfloat16 tensors on a CPU. None has a gradient.

    They raise RuntimeError for tensors of other types and shapes.
    """

    def __init__(self, namespace: Any) -> None:
        self._ops = namespace

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMS norm with the bits of transformers' LlamaRMSNorm: x (…, width), weight (width,)."""
        return cast(Tensor, self._ops.rms_norm(x, weight, epsilon))

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """The rotary embedding of x (rows, heads, width), cosine and sine ([1,] rows, width)."""
        return cast(Tensor, self._ops.rotary_embedding(x, cosine, sine))

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (rows, width) · weight (columns, width)ᵀ in float32, summed in one order: (rows, columns)."""
        return cast(Tensor, self._ops.logits(x.float(), weight))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm as torch computes it: x (…, width), weight (width,)."""
    single = x.float()
    return weight * (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
