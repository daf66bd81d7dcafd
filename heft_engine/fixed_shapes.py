"""Matrix products of fixed shapes, so that a row's bits don't depend on what it is batched with.

Matrix libraries choose the order of a product's sums by its shape: on this project's reference machine a bfloat16
product of 160 rows and one of 4,096 rows differ in the last bit, and 16 of 40 packed questions changed their scores
with their neighbours. Inside one shape, though, every row of a product is summed alike wherever it stands. So scoring
cuts each product over T tokens into blocks of two fixed heights, padded with zeros: LARGE ones for throughput and SMALL
ones for the rest. The large height is the smallest that is seen to give the small one's bits for every weight shape of
the model's layers on this machine; where none does, and for every other weight (the head, interventions), small
blocks do the work.

Activations have the same trouble on a CPU: float32 SiLU and tanh-GELU round differently in vector code and in the
scalar code for what is left at the end of a thread's share. They run on few whole rows at a time.

It does NOT know models beyond their linear layers and activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: A small block's rows. A GPU pays by the launch, a CPU by the row.
SMALL = {"cpu": 32}
SMALL_ELSEWHERE = 256
LARGE_CANDIDATES = (512, 768, 1_024, 1_536, 2_048, 3_072)
#: A remainder above this share of a large block is padded to one: large blocks run three to four times as fast a row.
PAD_ABOVE = 0.3
#: Elements that torch gives to one thread whole, and a multiple of every vector loop's stride.
_ONE_THREAD = 16_384
_STRIDE = 64


class FixedShapes(TorchFunctionMode):
    """While active in a thread, every linear layer multiplies blocks of `small` or `large` rows.

    `calibrated`: the shapes and dtypes of the weights for which `large` was seen to give the bits of `small`.
    """

    def __init__(
        self, small: int, large: int | None, calibrated: frozenset[tuple[Any, ...]] = frozenset()
    ) -> None:
        super().__init__()
        self.small = small
        self.large = large
        self.calibrated = calibrated

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        if func in (F.silu, F.gelu) and args[0].device.type == "cpu":
            return _by_rows(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (…, T, in) → (…, T, out), as F.linear."""
        flat = x.reshape(-1, x.shape[-1])
        plan = self.plan(len(flat), self.large if (*weight.shape, weight.dtype) in self.calibrated else None)
        blocks = [_block(flat[start : start + height], height, weight, bias) for start, height in plan]
        joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return joined.reshape(*x.shape[:-1], weight.shape[0])

    def plan(self, rows: int, large: int | None) -> list[tuple[int, int]]:
        """(start, height) of the blocks that cover so many rows; the last one may reach beyond them."""
        blocks, start = [], 0
        while rows - start > 0:
            height = large if large is not None and rows - start > PAD_ABOVE * large else self.small
            blocks.append((start, height))
            start += height
        return blocks


def _block(rows: Tensor, height: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(rows) == height:
        return F.linear(rows, weight, bias)
    return F.linear(F.pad(rows, (0, 0, 0, height - len(rows))), weight, bias)[: len(rows)]


def _by_rows(func: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """An activation of x (…, T, width), whole rows at a time; rows of an odd width one by one."""
    width = x.shape[-1]
    height = max(1, _ONE_THREAD // width) if width % _STRIDE == 0 else 1
    parts = [func(part, **options) for part in torch.split(x.reshape(-1, width), height)]
    return torch.cat(parts).reshape(x.shape)


@torch.inference_mode()
def calibrate(layers: Iterable[nn.Module], device: torch.device) -> FixedShapes:
    """The block heights for a model's linear layers on this machine, with its present number of threads."""
    small = SMALL.get(device.type, SMALL_ELSEWHERE)
    shapes: dict[tuple[Any, ...], nn.Linear] = {}
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.weight.device == device:
                shapes.setdefault((*module.weight.shape, module.weight.dtype), module)
    large = next(
        (height for height in LARGE_CANDIDATES if all(_agree(m, small, height) for m in shapes.values())),
        None,
    )
    return FixedShapes(small, large, frozenset(shapes))


def _agree(module: nn.Linear, small: int, large: int) -> bool:
    """Whether one product of `large` rows has the bits of products of `small` rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(large, module.in_features, generator=generator).to(module.weight)
    whole = F.linear(rows, module.weight, module.bias)
    parts = [_block(part, small, module.weight, module.bias) for part in torch.split(rows, small)]
    return torch.equal(whole, torch.cat(parts))
