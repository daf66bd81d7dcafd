"""Which heights of blocks give the same bits on this machine, and how long they take
(heft_engine.model.batch_invariant).

There is usually more than one family of heights that do, one with the smallest and the largest, another with those
between. Which of them is taken is decided on one thread by what heights it has, never by a clock, so that all processes
of a machine take the same, whatever their number of threads. It does NOT know passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heft_engine.cpu import packed_weights
from heft_engine.model.batch_invariant import (
    UNIT,
    UNIT_ELSEWHERE,
    FixedShapes,
    Heights,
    Shape,
    product,
    quickest,
)
from heft_engine.runtime import parallel
from heft_engine.runtime.threads import torch_threads

HEIGHTS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1_024, 1_536, 2_048)
#: Rows of a step of writing that are tried without padding them up to a unit.
FEW = (1, 2, 3, 4, 6, 8, 12, 16, 24)
#: Products with larger weights are as quick in blocks of a few hundred rows, and take long to measure.
_LARGE, _OF_LARGE = 1 << 22, 512
#: Families are looked for that have one of these heights.
_LEAST = (32, 64, 256)
#: What a block costs beyond its rows, counted in rows, and the passes by which families are compared.
_OF_A_BLOCK = 50
_PASSES = (192, 384, 768, 1_536, 3_072)
#: Times that each height's product is measured, the second if that takes no longer than so many seconds; the least
#: counts. A worker measures while the processes that were started with it are still loading.
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 3, 12, 0.5

#: Plain products' heights, and packed ones', by shape.
Found = dict[bool, dict[Shape, Heights]]


@torch.inference_mode()
def measured(layers: Iterable[nn.Module], device: torch.device) -> dict[int, FixedShapes]:
    """The shapes of a model's linear layers, for its present number of threads, and for what a lane has."""
    modules = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    weights: dict[Shape, _Weight] = {}
    by_amx: set[Shape] = set()
    for module in modules:
        shape = (*module.weight.shape, module.weight.dtype)
        if packed_weights.amx_for_weight(module.weight) is not None:
            by_amx.add(shape)
        elif module.weight.device == device:
            weights[shape] = weights.get(shape) or _Weight(module)
    threads = torch.get_num_threads()
    of_a_lane = parallel.threads_of_a_lane() if parallel.count(device) > 1 else threads
    with torch_threads(1):
        families = {shape: _family(weight) for shape, weight in weights.items()}
        alone = torch.get_num_threads() == 1
    found: dict[int, Found] = {}
    for number in {threads, of_a_lane}:
        with torch_threads(number):
            found[number] = _heights(weights, families, as_found=alone and number == 1)
            _measure(weights, found[number])
    is_alike = all(each[False].keys() == weights.keys() for each in found.values())
    unit = UNIT.get(device.type, UNIT_ELSEWHERE)
    fewer = {shape: _fewer(weight) for shape, weight in weights.items()}
    no_heights: dict[Shape, Heights] = {shape: {} for shape in found[threads][True]}
    steps = FixedShapes(unit, fewer=fewer, packed=no_heights, by_amx=by_amx)
    shapes = {}
    for number, each in found.items():
        plain, packed = ({shape: _no_slower(h) for shape, h in each[k].items()} for k in (False, True))
        shapes[number] = FixedShapes(
            unit, plain, steps=steps, packed=packed, is_alike=is_alike, by_amx=by_amx
        )
    return shapes


class _Weight:
    """One of the layers' weights, standing for all of its shape."""

    def __init__(self, module: nn.Linear) -> None:
        self.weight, self.bias = module.weight, module.bias
        kept = packed_weights.kept(module.weight)
        self.is_packed = kept is not None
        can_be = kept is None and packed_weights.packable(module.weight)
        self.packed = packed_weights.packed(module.weight) if can_be else kept
        self.unit = UNIT.get(module.weight.device.type, UNIT_ELSEWHERE)
        tallest = _OF_LARGE if self.weight.numel() > _LARGE else max(HEIGHTS)
        self.candidates = [height for height in HEIGHTS if height % self.unit == 0 and height <= tallest]
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(tallest, module.in_features, generator=generator).to(module.weight)

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Plain, and packed where there is such a product."""
        return (False, True) if self.packed is not None else (False,)

    def times(self, rows: Tensor, packed: bool) -> Tensor:
        return product(rows, self.weight, self.bias, self.packed if packed else None)


@dataclass(frozen=True)
class _Family:
    """Heights whose products, packed where there are such, have the bits of `exact`: the plain one of height `base`."""

    base: int
    exact: Tensor
    heights: list[int]


def _family(weight: _Weight) -> _Family:
    """Of all families the one whose blocks cover passes of many lengths the best."""
    packed = weight.kinds[-1]
    bases = [height for height in weight.candidates if height in _LEAST] or weight.candidates[:1]
    families = [_Family(base, _in_blocks(weight, base, False), []) for base in bases]
    for height in weight.candidates:
        found = _in_blocks(weight, height, packed)
        for family in families:
            if _agree(found, family.exact):
                family.heights.append(height)

    def cost(family: _Family) -> tuple[float, list[int]]:
        # Not all of them need have a packed product with their bits.
        heights = family.heights or [family.base]
        return _cost(heights, weight.unit), heights

    return min(families, key=cost)


def _heights(weights: Mapping[Shape, _Weight], families: Mapping[Shape, _Family], *, as_found: bool) -> Found:
    """Those with the families' bits with this number of threads; `as_found`: they were found with as many."""
    found: Found = {False: {}, True: {}}
    for shape, weight in weights.items():
        for packed in weight.kinds:
            family = families[shape]
            is_known = as_found and packed is weight.kinds[-1]
            heights = family.heights if is_known else _agreeing(weight, family, packed=packed)
            if heights:
                found[packed][shape] = dict.fromkeys(heights, math.inf)
    return found


def _agreeing(weight: _Weight, family: _Family, *, packed: bool) -> list[int]:
    if not packed and weight.is_packed and _agree(_in_blocks(weight, family.base, False), family.exact):
        return [family.base]  # for the few of its shape that are not packed
    return [
        height for height in weight.candidates if _agree(_in_blocks(weight, height, packed), family.exact)
    ]


def _fewer(weight: _Weight) -> tuple[int, ...]:
    """The numbers of rows whose product has the bits of one of a unit: texts are written in passes of a few."""
    exact = {packed: weight.times(weight.rows[: weight.unit], packed) for packed in weight.kinds}
    return tuple(
        few
        for few in FEW
        if all(_agree(weight.times(weight.rows[:few], packed), exact[packed]) for packed in weight.kinds)
    )


def _measure(weights: Mapping[Shape, _Weight], found: Found) -> None:
    """How long each height takes.

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


def _cost(family: list[int], unit: int) -> float:
    """Of passes of many lengths, each against a single block of its own length."""
    costs = {height: float(height + _OF_A_BLOCK) for height in family}
    return sum(quickest(costs, unit, -(-rows // unit))[0] / (rows + _OF_A_BLOCK) for rows in _PASSES)


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
