"""Matrix products of fixed shapes, so that a row's bits don't depend on what it is batched with.

Matrix libraries choose the order of a product's sums by its shape: on this project's reference machine a bfloat16
product of 160 rows and one of 4,096 rows differ in the last bit, and 16 of 40 packed questions changed their scores
with their neighbours. Inside one shape, though, every row of a product is summed alike wherever it stands. So scoring
cuts each product over T tokens into blocks of certain heights, padded with zeros where they reach beyond T: heights
that were seen, with weights of that shape on this machine, to give the same bits. There is usually more than one such
family of heights, one of them with the smallest and the largest, another with those between; which of them is taken is
decided by what heights it has, never by a clock, so that all processes of a machine with as many threads take the same.
Which of its heights cover T rows in the least time is measured: that choice moves no bits. Weights of other shapes (the
head, interventions) get blocks of UNIT rows.

Steps of writing (`steps`) have a few rows each and blocks of their own. They are never compared with a pass.

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

#: Heights are multiples of so many rows. A GPU pays by the launch, a CPU by the row.
UNIT = {"cpu": 32}
UNIT_ELSEWHERE = 256
HEIGHTS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1_024, 1_280, 1_536, 2_048)
#: Families are looked for that have one of these heights.
_LEAST = (32, 64, 256)
#: What a block costs beyond its rows, counted in rows, and the passes by which families are compared.
_OF_A_BLOCK = 85
_PASSES = (192, 384, 768, 1_536, 3_072)
#: Times that each height's product is measured, the second if that takes no longer than so many seconds; the least
#: counts. A worker measures while the processes that were started with it are still loading.
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 3, 12, 1.0
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

    `heights`: for shapes of weights, heights that were seen to give the same bits, multiples of `unit`.
    `fewer`: the numbers of rows below `unit` that give the bits of a product of `unit` rows; they need no padding.
    `steps`: for passes of one token a text, if they are to be others.
    """

    def __init__(
        self,
        unit: int,
        heights: Mapping[Shape, Heights] | None = None,
        fewer: Mapping[Shape, frozenset[int]] | None = None,
        steps: FixedShapes | None = None,
    ) -> None:
        super().__init__()
        self.unit = unit
        self.heights = heights or {}
        self.fewer = fewer or {}
        self.steps = steps or self
        self._least = max((min(each) for each in self.heights.values()), default=unit)
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
        """The next number of rows that blocks cover with little padding, or none."""
        return max(self._least, -(-rows // self.unit) * self.unit)

    def plan(self, shape: Shape, rows: int) -> tuple[int, ...]:
        """Heights of the blocks that cover so many rows, one after another; the last one may reach beyond them."""
        if rows < self.unit and rows in self.fewer.get(shape, ()):
            return (rows,)
        units = -(-rows // self.unit)
        heights = self.heights.get(shape)
        if heights is None:
            return (self.unit,) * units
        if (shape, units) not in self._plans:
            self._plans[shape, units] = _quickest(heights, self.unit, units)[1]
        return self._plans[shape, units]


def _quickest(costs: Heights, unit: int, units: int) -> tuple[float, tuple[int, ...]]:
    """The least cost of covering `units` times `unit` rows, and the blocks that do it, the tallest first."""
    best: list[tuple[float, int]] = [
        (0.0, 0)
    ]  # to cover so many: the cost, and the last block's height, negative
    for covered in range(1, units + 1):
        best.append(
            min((best[max(0, covered - height // unit)][0] + cost, -height) for height, cost in costs.items())
        )
    plan = []
    left = units
    while left > 0:
        plan.append(-best[left][1])
        left -= plan[-1] // unit
    return best[-1][0], tuple(sorted(plan, reverse=True))


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
    """Blocks of UNIT rows alone: for a few rows that nobody compares with a measured model's."""
    return FixedShapes(UNIT.get(device.type, UNIT_ELSEWHERE))


@torch.inference_mode()
def calibrate(layers: Iterable[nn.Module], device: torch.device) -> FixedShapes:
    """The block heights for a model's linear layers on this machine, with its present number of threads."""
    unit = UNIT.get(device.type, UNIT_ELSEWHERE)
    modules: dict[Shape, nn.Linear] = {}
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.weight.device == device:
                modules.setdefault((*module.weight.shape, module.weight.dtype), module)
    heights = _measured(modules, unit)
    fewer = {shape: _fewer(module, unit) for shape, module in modules.items()}
    return FixedShapes(unit, heights, steps=FixedShapes(unit, fewer=fewer))


def _fewer(module: nn.Linear, unit: int) -> frozenset[int]:
    """The numbers of rows below `unit` whose product has the bits of one of `unit` rows: texts are written in
    passes of a few rows."""
    weight, bias = module.weight, module.bias
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(unit, module.in_features, generator=generator).to(weight)
    exact = _product(rows, weight, bias)
    return frozenset(n for n in range(1, unit) if _agree(_product(rows[:n], weight, bias), exact))


def _measured(modules: Mapping[Shape, nn.Linear], unit: int) -> dict[Shape, Heights]:
    """For each shape of weights a family of heights that give the same bits, and how long they take.

    Rounds over all of them, so that what else the machine does in one moment decides against none.
    """
    rows = {shape: _rows(module) for shape, module in modules.items()}
    found: dict[Shape, Heights] = {
        shape: dict.fromkeys(_family(rows[shape], module.weight, module.bias, unit), math.inf)
        for shape, module in modules.items()
    }
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > ROUNDS_SECONDS:
            break
        for shape, module in modules.items():
            for height, least in found[shape].items():
                took = _seconds(rows[shape][:height], module.weight, module.bias)
                found[shape][height] = min(least, took)
    return {shape: _no_slower(seconds) for shape, seconds in found.items()}


def _no_slower(seconds: Heights) -> Heights:
    """A tall block is likelier to be interrupted than the small ones it replaces: it is no slower, that is assumed."""
    least = min(seconds)
    return {height: min(took, -(-height // least) * seconds[least]) for height, took in seconds.items()}


def _rows(module: nn.Linear) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(max(HEIGHTS), module.in_features, generator=generator).to(module.weight)


def _family(rows: Tensor, weight: Tensor, bias: Tensor | None, unit: int) -> list[int]:
    """Of all families, the one whose blocks cover passes of many lengths the best."""
    candidates = [height for height in HEIGHTS if height % unit == 0]
    bases = [height for height in candidates if height in _LEAST] or candidates[:1]
    exact = {base: _in_blocks(rows, base, weight, bias) for base in bases}
    families: dict[int, list[int]] = {base: [] for base in bases}
    for height in candidates:
        found = exact[height] if height in exact else _in_blocks(rows, height, weight, bias)
        for base, family in families.items():
            if _agree(found, exact[base]):
                family.append(height)
    return min(families.values(), key=lambda family: (_cost(family, unit), family))


def _cost(family: list[int], unit: int) -> float:
    """Of passes of many lengths, each against a single block of its own length."""
    costs = {height: float(height + _OF_A_BLOCK) for height in family}
    return sum(_quickest(costs, unit, -(-rows // unit))[0] / (rows + _OF_A_BLOCK) for rows in _PASSES)


def _in_blocks(rows: Tensor, height: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of as many rows as fill blocks of this height."""
    whole = rows[: len(rows) // height * height]
    return torch.cat([_product(part, weight, bias) for part in torch.split(whole, height)])


def _agree(some: Tensor, exact: Tensor) -> bool:
    """Whether two products have the same bits as far as both go."""
    rows = min(len(some), len(exact))
    return torch.equal(some[:rows], exact[:rows])


def _seconds(rows: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Of one product."""
    began = time.perf_counter()
    _product(rows, weight, bias)
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
    return time.perf_counter() - began
