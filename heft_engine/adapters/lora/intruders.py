"""Intruder dimensions: singular vectors of a tuned weight that are unlike any of the original weight's.

Shuttleworth et al., arXiv 2410.21228, algorithm 1: of the tuned weight's TOP highest left singular vectors, those whose
largest |cosine| with any left singular vector of the original is under EPSILON. LoRA brings them, full fine-tuning does
not, and they go with forgetting. Scaling their singular values down (section 5) undoes much of it:

    W' + (λ − 1)·Σ σᵢuᵢvᵢᵀ over the intruders i

This is a change of rank r + intruders. peft's `reduce_intruder_dimension` computes the same sum and then cuts it back
to rank r; here it stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heft_engine.adapters.lora.concat import concatenate
from heft_engine.adapters.lora.weights import LoraWeights

TOP = 10
EPSILON = 0.5


@dataclass(frozen=True, kw_only=True)
class Intruders:
    """The intruders of one tuned weight, float32 on the CPU.

    before, after: all singular values of the original and of the tuned weight.
    values, left, right: the intruders' σ (k,), u (out, k) and vᵀ (k, in).
    cosines: the largest |cosine| of each of the TOP singular vectors.
    """

    before: Tensor
    after: Tensor
    values: Tensor
    left: Tensor
    right: Tensor
    cosines: Tensor

    @property
    def count(self) -> int:
        return len(self.values)

    def strength(self, weight: Tensor) -> Tensor:
        """Returns uᵢᵀWvᵢ / σᵢ (k,): how much of each intruder is in a weight; 1 in the tuned one."""
        return torch.einsum("oi,ok,ki->k", weight.float().cpu(), self.left, self.right) / self.values


def find(original: Tensor, tuned: Tensor, top: int = TOP, epsilon: float = EPSILON) -> Intruders:
    """Returns the intruder dimensions of `tuned` (out, in)."""
    original_left, before, _ = torch.linalg.svd(original.float().cpu(), full_matrices=False)
    left, values, right = torch.linalg.svd(tuned.float().cpu(), full_matrices=False)
    cosines = (left[:, :top].T @ original_left).abs().amax(dim=1)
    indices = torch.nonzero(cosines < epsilon)[:, 0]
    return Intruders(
        before=before,
        after=values,
        values=values[indices],
        left=left[:, indices],
        right=right[indices],
        cosines=cosines,
    )


def repaired(
    adapter: LoraWeights, weight_of: Callable[[str], Tensor], scale: float
) -> tuple[LoraWeights, int]:
    """Returns the adapter with the singular values of its intruders times `scale`, and the number of intruders.

    `weight_of` returns the weight that the adapter was trained on.
    """
    intruders = {}
    for module in adapter.factors:
        weight = weight_of(module)
        intruders[module] = find(weight, adapter.merged(module, weight))
    rank = max(of_module.count for of_module in intruders.values())
    if rank == 0:
        return adapter, 0
    factors = {}
    for module, of_module in intruders.items():
        count = of_module.count
        down = torch.zeros(rank, of_module.right.shape[1])
        up = torch.zeros(of_module.left.shape[0], rank)
        down[:count], up[:, :count] = of_module.right, (scale - 1) * of_module.values * of_module.left
        factors[module] = (down, up)
    repair = replace(adapter, factors=factors, magnitudes=None, rank=rank, alpha=float(rank), scaling=1.0)
    total = sum(of_module.count for of_module in intruders.values())
    return concatenate([adapter, repair], weight_of), total
