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

Packed weights (heft_engine.packed_weights) are taken where they are kept, and lanes (heft_engine.lanes) compute with
fewer threads than a row alone gets. Each has families of its own, with the same bits: it does not matter for a score
whether a process had the memory to pack its weights, nor how many rows there were to deal out.

Steps of writing (`steps`) have a few rows each and blocks of their own. They are never compared with a pass.

Activations have the same trouble on a CPU: float32 SiLU and tanh-GELU round differently in vector code and in the
scalar code for what is left at the end of a thread's share. They run on shares that leave nothing.

It does NOT know models beyond their linear layers and activations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heft_engine import lanes, packed_weights

#: Heights are multiples of so many rows. A GPU pays by the launch, a CPU by the row.
UNIT = {"cpu": 32}
UNIT_ELSEWHERE = 256
HEIGHTS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1_024, 1_536, 2_048)
#: Rows of a step of writing that are tried without padding them up to a unit.
FEW = (1, 2, 3, 4, 6, 8, 12, 16, 24)
#: Products with larger weights are as quick in blocks of a few hundred rows, and take long to measure.
_LARGE, _OF_LARGE = 1 << 22, 512
#: Weights up to so many elements gain nothing from several threads.
_SMALL = 1 << 19
#: Families are looked for that have one of these heights.
_LEAST = (32, 64, 256)
#: What a block costs beyond its rows, counted in rows, and the passes by which families are compared.
_OF_A_BLOCK = 50
_PASSES = (192, 384, 768, 1_536, 3_072)
#: Times that each height's product is measured, the second if that takes no longer than so many seconds; the least
#: counts. A worker measures while the processes that were started with it are still loading.
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 3, 12, 0.5
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
    `steps`: for passes of one token a text, if they are to be others.
    """

    def __init__(
        self,
        unit: int,
        heights: Mapping[Shape, Heights] | None = None,
        fewer: Mapping[Shape, Sequence[int]] | None = None,
        steps: FixedShapes | None = None,
        packed: Mapping[Shape, Heights] | None = None,
    ) -> None:
        super().__init__()
        self.unit = unit
        self.heights = heights or {}
        self.packed = packed or {}
        #: Whether a lane gives a row the same bits.
        self.is_alike = True
        self.fewer = fewer or {}
        self.steps = steps or self
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
        if shape in self.heights or weight.numel() > _SMALL or weight.device.type != "cpu":
            return self._linear(x, weight, bias, shape)
        # An intervention's: nobody has looked whether more threads round otherwise.
        with lanes.computing_with(1):
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
            self._plans[key] = _quickest(heights, self.unit, units)[1]
        return self._plans[key]


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
    rows: Tensor,
    height: int,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The product of so many rows, padded up to `height`; written to `out` if there is one."""
    if len(rows) == height:
        return _product(rows, weight, bias, packed, out)
    padded = _product(F.pad(rows, (0, 0, 0, height - len(rows))), weight, bias, packed)[: len(rows)]
    return padded if out is None else out.copy_(padded)


def _product(
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
    shapes = FixedShapes(UNIT.get(device.type, UNIT_ELSEWHERE))
    shapes.is_alike = False  # that was not measured either
    return shapes


@torch.inference_mode()
def calibrate(layers: Iterable[nn.Module], device: torch.device) -> dict[int, FixedShapes]:
    """The block heights for a model's linear layers on this machine: for its present number of threads, and for what a
    lane has."""
    unit = UNIT.get(device.type, UNIT_ELSEWHERE)
    weights: dict[Shape, _Weight] = {}
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.weight.device == device:
                shape = (*module.weight.shape, module.weight.dtype)
                weights[shape] = weights.get(shape) or _Weight(module)
    threads = torch.get_num_threads()
    fewest = lanes.threads_of_a_lane() if lanes.count(device) > 1 else threads
    with lanes.computing_with(1):
        bases = {shape: _base(weight, unit) for shape, weight in weights.items()}
    found = {}
    for number in {threads, fewest}:
        with lanes.computing_with(number):
            found[number] = _calibrated(weights, bases, unit, FEW if number == threads else None)
            found[number].is_alike = found[number].heights.keys() == weights.keys()
    return found


def _calibrated(
    weights: Mapping[Shape, _Weight],
    bases: Mapping[Shape, tuple[int, Tensor]],
    unit: int,
    few: Sequence[int] | None,
) -> FixedShapes:
    """With the bits of the bases. `few`: numbers of rows that steps of writing may have."""
    heights: dict[bool, dict[Shape, Heights]] = {False: {}, True: {}}
    for shape, weight in weights.items():
        for packed in (False, True):
            family = _agreeing(weight, bases[shape], unit, packed=packed)
            if family:
                heights[packed][shape] = dict.fromkeys(family, math.inf)
    _measure(weights, heights)
    fewer = {} if few is None else {shape: _fewer(weight, few, unit) for shape, weight in weights.items()}
    plain, packed_ones = (
        {shape: _no_slower(each) for shape, each in heights[k].items()} for k in (False, True)
    )
    steps = FixedShapes(unit, fewer=fewer, packed={shape: {} for shape in packed_ones})
    return FixedShapes(unit, plain, steps=steps, packed=packed_ones)


class _Weight:
    """One of the layers' weights, standing for all of its shape."""

    def __init__(self, module: nn.Linear) -> None:
        self.weight, self.bias = module.weight, module.bias
        self.is_packed = packed_weights.kept(module.weight) is not None
        can_be = not self.is_packed and packed_weights.packable(module.weight)
        self.packed = packed_weights.packed(module.weight) if can_be else packed_weights.kept(module.weight)
        generator = torch.Generator().manual_seed(0)
        tallest = _OF_LARGE if self.weight.numel() > _LARGE else max(HEIGHTS)
        self.rows = torch.randn(tallest, module.in_features, generator=generator).to(module.weight)

    def candidates(self, unit: int) -> list[int]:
        return [height for height in HEIGHTS if height % unit == 0 and height <= len(self.rows)]

    def times(self, rows: Tensor, packed: bool) -> Tensor:
        return _product(rows, self.weight, self.bias, self.packed if packed else None)


def _fewer(weight: _Weight, few: Sequence[int], unit: int) -> tuple[int, ...]:
    """The numbers of rows whose product has the bits of one of `unit` rows: texts are written in passes of a few."""
    kinds = (False, True) if weight.packed is not None else (False,)
    exact = {kind: weight.times(weight.rows[:unit], kind) for kind in kinds}
    return tuple(
        n
        for n in few
        if n < unit and all(_agree(weight.times(weight.rows[:n], kind), exact[kind]) for kind in kinds)
    )


def _measure(weights: Mapping[Shape, _Weight], found: Mapping[bool, Mapping[Shape, Heights]]) -> None:
    """How long each height takes, plain and packed.

    Rounds over all of them, so that what else the machine does in one moment decides against none.
    """
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > ROUNDS_SECONDS:
            break
        for packed, shapes in found.items():
            for shape, heights in shapes.items():
                for height, least in heights.items():
                    heights[height] = min(least, _seconds(weights[shape], height, packed))


def _no_slower(seconds: Heights) -> Heights:
    """A tall block is likelier to be interrupted than the small ones it replaces: it is no slower, that is assumed."""
    least = min(seconds)
    return {height: min(took, -(-height // least) * seconds[least]) for height, took in seconds.items()}


def _base(weight: _Weight, unit: int) -> tuple[int, Tensor]:
    """The height whose plain product has the bits of a whole family, and that product.

    Of all families, the one whose blocks cover passes of many lengths the best: of packed products, where there are.
    """
    candidates = weight.candidates(unit)
    bases = [height for height in candidates if height in _LEAST] or candidates[:1]
    exact = {base: _in_blocks(weight, base, False) for base in bases}
    families: dict[int, list[int]] = {base: [] for base in bases}
    packed = weight.packed is not None
    for height in candidates:
        found = exact[height] if height in exact and not packed else _in_blocks(weight, height, packed)
        for base, family in families.items():
            if _agree(found, exact[base]):
                family.append(height)
    # Not all of them need have a packed product with their bits.
    judged = {base: family or [base] for base, family in families.items()}
    best = min(bases, key=lambda base: (_cost(judged[base], unit), judged[base]))
    return best, exact[best]


def _agreeing(weight: _Weight, base: tuple[int, Tensor], unit: int, *, packed: bool) -> list[int]:
    """Heights whose products have the base's bits, plain or packed."""
    height, exact = base
    if packed and weight.packed is None:
        return []
    candidates = weight.candidates(unit)
    if not packed and weight.is_packed and _agree(_in_blocks(weight, height, False), exact):
        return [height]  # for the few of its shape that are not packed
    return [height for height in candidates if _agree(_in_blocks(weight, height, packed), exact)]


def _cost(family: list[int], unit: int) -> float:
    """Of passes of many lengths, each against a single block of its own length."""
    costs = {height: float(height + _OF_A_BLOCK) for height in family}
    return sum(_quickest(costs, unit, -(-rows // unit))[0] / (rows + _OF_A_BLOCK) for rows in _PASSES)


def _in_blocks(weight: _Weight, height: int, packed: bool) -> Tensor:
    """The product of as many rows as fill blocks of this height."""
    whole = weight.rows[: len(weight.rows) // height * height]
    return torch.cat([weight.times(part, packed) for part in torch.split(whole, height)])


def _agree(some: Tensor, exact: Tensor) -> bool:
    """Whether two products have the same bits as far as both go."""
    rows = min(len(some), len(exact))
    return torch.equal(some[:rows], exact[:rows])


def _seconds(weight: _Weight, height: int, packed: bool) -> float:
    """Of one product."""
    rows = weight.rows[:height]
    began = time.perf_counter()
    weight.times(rows, packed)
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
    return time.perf_counter() - began
