"""Matrix products of fixed shapes, so that a row's bits don't depend on what it is batched with.

Matrix libraries choose the order of a product's sums by its shape: on this project's reference machine a bfloat16
product of 160 rows and one of 4,096 rows differ in the last bit, and 16 of 40 packed questions changed their scores
with their neighbours. Inside one shape, though, every row of a product is summed alike wherever it stands. So scoring
cuts each product over T tokens into blocks of fixed heights, padded with zeros: SMALL ones, and larger ones that were
seen to give the small ones' bits with weights of that shape on this machine. Which of them cover T rows in the least
time was measured too; since all have the same bits, that choice changes nothing else. Weights of other shapes (the
head, interventions) get small blocks.

Activations have the same trouble on a CPU: float32 SiLU and tanh-GELU round differently in vector code and in the
scalar code for what is left at the end of a thread's share. They run on shares that leave nothing.

It does NOT know models beyond their linear layers and activations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: A small block's rows. A GPU pays by the launch, a CPU by the row.
SMALL = {"cpu": 32}
SMALL_ELSEWHERE = 256
LARGE_CANDIDATES = (64, 128, 256, 384, 512, 768, 1_024, 1_280, 1_536, 2_048, 3_072)
#: Times that each height's product is measured; the least counts.
ROUNDS = 5
#: Elements that torch gives to one thread whole, at least, and a multiple of every vector loop's stride.
_GRAIN = 32_768
_STRIDE = 64
_ONE_THREAD = _GRAIN // 2

#: Of one shape of weights: seconds that a product of each height takes.
Heights = dict[int, float]
#: Rows and columns of a weight, and its dtype.
Shape = tuple[Any, ...]


class FixedShapes(TorchFunctionMode):
    """While active in a thread, every linear layer multiplies blocks of fixed heights.

    `larger`: for shapes of weights, the heights that were seen to give the bits of `small`, and `small` itself.
    `fewer`: the numbers of rows below `small` of which the same was seen; they need no padding.
    """

    def __init__(
        self,
        small: int,
        larger: Mapping[Shape, Heights] | None = None,
        fewer: Mapping[Shape, frozenset[int]] | None = None,
    ) -> None:
        super().__init__()
        self.small = small
        self.larger = larger or {}
        self.fewer = fewer or {}
        self._plans: dict[tuple[Shape, int], tuple[int, ...]] = {}

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
        plan = self.plan((*weight.shape, weight.dtype), len(flat))
        if len(plan) == 1:
            out = _block(flat, plan[0], weight, bias)
        else:
            out = flat.new_empty(len(flat), weight.shape[0])
            start = 0
            for height in plan:
                part = slice(start, start + height)
                _block(flat[part], height, weight, bias, out[part])
                start += height
        return out.reshape(*x.shape[:-1], weight.shape[0])

    def whole(self, rows: int) -> int:
        """The next number of rows that small blocks cover without padding."""
        return -(-rows // self.small) * self.small

    def plan(self, shape: Shape, rows: int) -> tuple[int, ...]:
        """Heights of the blocks that cover so many rows, one after another; the last one may reach beyond them."""
        if rows < self.small and rows in self.fewer.get(shape, ()):
            return (rows,)
        smalls = -(-rows // self.small)
        heights = self.larger.get(shape)
        if heights is None or smalls < 2:
            return (self.small,) * smalls
        if (shape, smalls) not in self._plans:
            self._plans[shape, smalls] = _quickest(heights, self.small, smalls)
        return self._plans[shape, smalls]


def _quickest(heights: Heights, small: int, smalls: int) -> tuple[int, ...]:
    """The blocks that cover `smalls` times `small` rows in the least time, the tallest first."""
    best: list[tuple[float, int]] = [
        (0.0, 0)
    ]  # to cover so many: the time, and the last block's height, negative
    for covered in range(1, smalls + 1):
        best.append(
            min(
                (best[max(0, covered - height // small)][0] + seconds, -height)
                for height, seconds in heights.items()
            )
        )
    plan = []
    left = smalls
    while left > 0:
        plan.append(-best[left][1])
        left -= plan[-1] // small
    return tuple(sorted(plan, reverse=True))


def _block(
    rows: Tensor, height: int, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """The product of so many rows, padded up to `height`; written to `out` if there is one."""
    if len(rows) == height:
        return _product(rows, weight, bias, out)
    padded = _product(F.pad(rows, (0, 0, 0, height - len(rows))), weight, bias)[: len(rows)]
    return padded if out is None else out.copy_(padded)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """F.linear of (n, in), which can't be told where to write."""
    return torch.mm(rows, weight.T, out=out) if bias is None else torch.addmm(bias, rows, weight.T, out=out)


def _by_rows(func: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """An activation of x (…, T, width) whose threads' shares are whole strides; rows of an odd width one by one."""
    width = x.shape[-1]
    flat, threads = x.reshape(-1, width), torch.get_num_threads()
    even = len(flat) - len(flat) % threads
    if width % _STRIDE == 0 and even * width >= threads * _GRAIN:
        # Every thread gets the same number of whole rows.
        parts = [func(flat[:even], **options)]
        flat = flat[even:]
    else:
        parts = []
    height = max(1, _ONE_THREAD // width) if width % _STRIDE == 0 else 1
    parts += [func(part, **options) for part in torch.split(flat, height) if len(part)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(x.shape)


def unmeasured(device: torch.device) -> FixedShapes:
    """Small blocks alone."""
    return FixedShapes(SMALL.get(device.type, SMALL_ELSEWHERE))


@torch.inference_mode()
def calibrate(layers: Iterable[nn.Module], device: torch.device) -> FixedShapes:
    """The block heights for a model's linear layers on this machine, with its present number of threads."""
    small = SMALL.get(device.type, SMALL_ELSEWHERE)
    modules: dict[Shape, nn.Linear] = {}
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.weight.device == device:
                modules.setdefault((*module.weight.shape, module.weight.dtype), module)
    larger = {shape: _heights(module, small) for shape, module in modules.items()}
    return FixedShapes(small, larger, {shape: _fewer(module, small) for shape, module in modules.items()})


def _fewer(module: nn.Linear, small: int) -> frozenset[int]:
    """The numbers of rows below `small` whose product has the bits of one of `small` rows: texts are written in
    passes of a few rows."""
    weight, bias = module.weight, module.bias
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(small, module.in_features, generator=generator).to(weight)
    exact = _product(rows, weight, bias)
    return frozenset(n for n in range(1, small) if _agree(rows[:n], weight, bias, exact[:n]))


def _heights(module: nn.Linear, small: int) -> Heights:
    """Which heights give the bits of products of `small` rows, and how long they take."""
    weight, bias = module.weight, module.bias
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(LARGE_CANDIDATES), module.in_features, generator=generator).to(weight)
    exact = torch.cat([_product(part, weight, bias) for part in torch.split(rows, small)])
    taller = [
        height
        for height in LARGE_CANDIDATES
        if height % small == 0 and height > small and _agree(rows[:height], weight, bias, exact[:height])
    ]
    seconds = dict.fromkeys([small, *taller], math.inf)
    # Rounds over all heights, so that what else the machine does in one moment does not decide against one of them.
    for _ in range(ROUNDS):
        for height in seconds:
            seconds[height] = min(seconds[height], _seconds(rows[:height], weight, bias))
    # A tall block is more likely to be interrupted than the small ones it replaces; that it is no slower is assumed.
    return {height: min(least, height // small * seconds[small]) for height, least in seconds.items()}


def _agree(rows: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor) -> bool:
    return torch.equal(_product(rows, weight, bias), exact)


def _seconds(rows: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Of one product."""
    began = time.perf_counter()
    _product(rows, weight, bias)
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
    return time.perf_counter() - began
