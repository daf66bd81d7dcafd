"""`python -m benchmarks.matmul`: speed of the matrix products of a SmolLM2 layer by the number of tokens.

On two cores, oneDNN computes some shapes on one of them only.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: (out, in) of a layer's weights, and their number.
WEIGHTS = {(576, 576): 2, (192, 576): 2, (1_536, 576): 2, (576, 1_536): 1}
TOKENS = (256, 512, 544, 576, 768, 1_024, 1_152, 1_280, 1_312, 1_344, 1_536, 1_664)


def main() -> None:
    print(f"{torch.get_num_threads()} threads, bfloat16, GFLOP/s; forward x·Wᵀ, backward g·W")
    names = [f"{out}x{wide}" for out, wide in WEIGHTS]
    print("tokens", *(f"{name:>9}" for name in [*names, *names]), "  layer")
    for tokens in TOKENS:
        rates, seconds, work = [], 0.0, 0
        for backward in (False, True):
            for (out, wide), count in WEIGHTS.items():
                weight = torch.randn(out, wide).bfloat16()
                x = torch.randn(tokens, out if backward else wide).bfloat16()
                product_seconds = _seconds(x, weight, backward)
                operations = 2 * tokens * out * wide
                rates.append(operations / product_seconds / 1e9)
                seconds, work = seconds + count * product_seconds, work + count * operations
        print(f"{tokens:6}", *(f"{rate:9.0f}" for rate in rates), f"{work / seconds / 1e9:9.0f}", flush=True)


def _seconds(x: Tensor, weight: Tensor, backward: bool) -> float:
    """The shortest of six measurements."""
    shortest = float("inf")
    for _ in range(6):
        started_at = time.perf_counter()
        _ = x @ weight if backward else F.linear(x, weight)
        shortest = min(shortest, time.perf_counter() - started_at)
    return shortest


if __name__ == "__main__":
    main()
