"""Matrix products of fixed shapes, so that a row's bits don't depend on what it is batched with.

Matrix libraries choose the order of a product's sums by its shape: on this project's reference machine a bfloat16
product of 160 rows and one of 4,096 rows differ in the last bit, and 16 of 40 packed questions changed their scores
with their neighbours. Inside one shape, though, every row of a product is summed alike wherever it stands. So scoring
cuts each product over T tokens into blocks of certain heights, padded with zeros where they reach beyond T: heights
that were seen to give the same bits (heft_engine.model.block_sizes). Which of them cover T rows in the least time was
measured: that choice moves no bits. Weights of other shapes (the head, interventions) get blocks of UNIT rows.

Where a CPU has matrix units that heft_engine.cpu.amx can use, none of this is needed: a row's sums are the same
in every product there, and all layers' products are theirs.

Packed weights (heft_engine.cpu.packed_weights) are taken where they are kept, and lanes (heft_engine.runtime.parallel)
compute with
fewer threads than a row alone gets. Each has families of its own, with the same bits: it does not matter for a score
whether a process had the memory to pack its weights, nor how many rows there were to deal out.

Steps of writing (`steps`) have a few rows each and blocks of their own. They are never compared with a pass.

Activations have the same trouble on a CPU: float32 SiLU and tanh-GELU round differently in vector code and in the
scalar code for what is left at the end of a thread's share. They run on shares that leave nothing.

It does NOT know models beyond their linear layers and activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from heft_engine.cpu import packed_weights
from heft_engine.runtime.threads import torch_threads

#: Heights are multiples of so many rows. A GPU pays by the launch, a CPU by the row.
UNIT = {"cpu": 32}
UNIT_ELSEWHERE = 256
#: Weights up to so many elements gain nothing from several threads.
_SMALL = 1 << 19
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

    `heights`: for shapes of weights, heights that were seen to give the same bits, multiples of `unit`. `packed`: the
    same of packed weights, with the bits of the plain ones.
    `fewer`: numbers of rows below `unit` that give the bits of a product of `unit` rows: these are padded to the next.
    `steps`: for passes of one token a text, if they are to be others. `is_alike`: whether a lane gives a row the bits
    that it gets from all threads. `by_amx`: shapes of weights that are left to AMX.
    """

    def __init__(
        self,
        unit: int,
        heights: Mapping[Shape, Heights] | None = None,
        fewer: Mapping[Shape, Sequence[int]] | None = None,
        steps: FixedShapes | None = None,
        packed: Mapping[Shape, Heights] | None = None,
        *,
        is_alike: bool = True,
        by_amx: Collection[Shape] = (),
    ) -> None:
        super().__init__()
        self.unit = unit
        self.heights = heights or {}
        self.packed = packed or {}
        self.is_alike = is_alike
        self.by_amx = frozenset(by_amx)
        self.fewer = fewer or {}
        self.steps = steps or self
        self._known = self.heights.keys() | self.packed.keys() | self.fewer.keys()
        every = [*self.heights.values(), *self.packed.values()]
        self._least = max((min(each) for each in every if each), default=unit)
        self._plans: dict[tuple[Shape, int, bool], tuple[int, ...]] = {}

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
        shape = (*weight.shape, weight.dtype)
        if shape in self.by_amx and (amx_ops := packed_weights.amx_for_weight(weight)) is not None:
            return amx_ops.linear(x, weight, packed_weights.kept(weight), bias)
        if shape in self._known or weight.numel() > _SMALL or weight.device.type != "cpu":
            return self._linear(x, weight, bias, shape)
        # An intervention's: nobody has looked whether more threads round otherwise.
        with torch_threads(1):
            return self._linear(x, weight, bias, shape)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        packed = packed_weights.kept(weight) if shape in self.packed else None
        plan = self.plan(shape, len(flat), is_packed=packed is not None)
        if len(plan) == 1:
            out = _block(flat, plan[0], weight, bias, packed)
        else:
            out = flat.new_empty(len(flat), weight.shape[0])
            start = 0
            for height in plan:
                part = slice(start, start + height)
                _block(flat[part], height, weight, bias, packed, out[part])
                start += height
        return out.reshape(*x.shape[:-1], weight.shape[0])

    def whole(self, rows: int) -> int:
        """The next number of rows that blocks cover with little padding, or none."""
        if self.by_amx and not self._known:
            return rows
        return max(self._least, -(-rows // self.unit) * self.unit)

    def plan(self, shape: Shape, rows: int, *, is_packed: bool = False) -> tuple[int, ...]:
        """Heights of the blocks that cover so many rows, one after another; the last one may reach beyond them."""
        if rows < self.unit and (enough := [few for few in self.fewer.get(shape, ()) if few >= rows]):
            return (min(enough),)
        units = -(-rows // self.unit)
        heights = (self.packed if is_packed else self.heights).get(shape)
        if not heights:
            return (self.unit,) * units
        key = (shape, units, is_packed)
        if key not in self._plans:
            self._plans[key] = quickest(heights, self.unit, units)[1]
        return self._plans[key]


def quickest(costs: Heights, unit: int, units: int) -> tuple[float, tuple[int, ...]]:
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
    rows: Tensor,
    height: int,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The product of so many rows, padded up to `height`; written to `out` if there is one."""
    if len(rows) == height:
        return product(rows, weight, bias, packed, out)
    padded = product(F.pad(rows, (0, 0, 0, height - len(rows))), weight, bias, packed)[: len(rows)]
    return padded if out is None else out.copy_(padded)


def product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """F.linear of (n, in), which can't be told where to write; with the packed weight where there is one."""
    if packed is not None:
        found = packed_weights.product(rows, packed, bias)
        return found if out is None else out.copy_(found)
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
    # Whether threads matter was not measured either.
    return FixedShapes(UNIT.get(device.type, UNIT_ELSEWHERE), is_alike=False)
