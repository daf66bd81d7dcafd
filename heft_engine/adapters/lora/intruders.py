"""Intruder dimensions: singular vectors of a tuned weight that the original one has nothing like.

Shuttleworth et al., arXiv 2410.21228, algorithm 1: of the tuned weight's TOP highest left singular vectors, those whose
largest |cosine| with any left singular vector of the original is under EPSILON. LoRA brings them, full fine-tuning does
not, and they go with forgetting. Scaling their singular values down (section 5 there) undoes much of it:

    W' + (λ − 1)·Σ σᵢuᵢvᵢᵀ over the intruders i

which is a change of rank r + intruders. peft's `reduce_intruder_dimension` computes the same sum and then cuts it back
to rank r; here it stays whole. It does NOT know models or stages.
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
    """Of one matrix: σ, u (out, k) and vᵀ (k, in) of its intruders, and the largest |cosine| of every one looked at.

    `before` and `after` are all singular values of the original and of the tuned weight.
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
        """uᵢᵀWvᵢ / σᵢ: how much of each is (still) in a weight; 1 in the one where they were found."""
        return torch.einsum("oi,ok,ki->k", weight.float().cpu(), self.left, self.right) / self.values


def find(original: Tensor, tuned: Tensor, top: int = TOP, epsilon: float = EPSILON) -> Intruders:
    """The intruder dimensions of `tuned` (out, in), float32 on the CPU."""
    own, before, _ = torch.linalg.svd(original.float().cpu(), full_matrices=False)
    left, values, right = torch.linalg.svd(tuned.float().cpu(), full_matrices=False)
    cosines = (left[:, :top].T @ own).abs().amax(dim=1)
    at = torch.nonzero(cosines < epsilon)[:, 0]
    return Intruders(
        before=before, after=values, values=values[at], left=left[:, at], right=right[at], cosines=cosines
    )


def repaired(
    adapter: LoraWeights, weight_of: Callable[[str], Tensor], scale: float
) -> tuple[LoraWeights, int]:
    """The adapter with the singular values of its intruders times `scale`, and how many there were.

    `weight_of` gives the weight that the adapter was trained on.
    """
    found = {}
    for module in adapter.factors:
        weight = weight_of(module)
        found[module] = find(weight, adapter.merged(module, weight))
    rank = max(one.count for one in found.values())
    if rank == 0:
        return adapter, 0
    factors = {}
    for module, one in found.items():
        down = torch.zeros(rank, one.right.shape[1])
        up = torch.zeros(one.left.shape[0], rank)
        down[: one.count], up[:, : one.count] = one.right, (scale - 1) * one.values * one.left
        factors[module] = (down, up)
    repair = replace(adapter, factors=factors, magnitudes=None, rank=rank, alpha=float(rank), scaling=1.0)
    return concatenate([adapter, repair], weight_of), sum(one.count for one in found.values())
