"""`python -m benchmarks.matmul`: how fast the products of a layer of SmolLM2 run at different heights.

A height is the number of tokens in a pass. On two cores oneDNN gives some shapes to one of them.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: (out, in) of a layer's weights and how often each occurs.
WEIGHTS = {(576, 576): 2, (192, 576): 2, (1_536, 576): 2, (576, 1_536): 1}
HEIGHTS = (256, 512, 544, 576, 768, 1_024, 1_152, 1_280, 1_312, 1_344, 1_536, 1_664)


def main() -> None:
    print(f"{torch.get_num_threads()} threads, bfloat16, GFLOP/s; forward x·Wᵀ, backward g·W")
    names = [f"{out}x{wide}" for out, wide in WEIGHTS]
    print("tokens", *(f"{name:>9}" for name in [*names, *names]), "  a layer")
    for height in HEIGHTS:
        rates, seconds, work = [], 0.0, 0
        for backward in (False, True):
            for (out, wide), count in WEIGHTS.items():
                weight = torch.randn(out, wide).bfloat16()
                x = torch.randn(height, out if backward else wide).bfloat16()
                spent = _seconds(x, weight, backward)
                operations = 2 * height * out * wide
                rates.append(operations / spent / 1e9)
                seconds, work = seconds + count * spent, work + count * operations
        print(f"{height:6}", *(f"{rate:9.0f}" for rate in rates), f"{work / seconds / 1e9:9.0f}", flush=True)


def _seconds(x: Tensor, weight: Tensor, backward: bool) -> float:
    """The best of a few."""
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        _ = x @ weight if backward else F.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
