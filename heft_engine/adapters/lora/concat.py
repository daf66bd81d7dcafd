"""Several adapters of one base, merged one after the other, as one adapter of the same base.

What has been merged so far is c ⊙ (W + U·D), row by row, with c = 1 until a DoRA adapter comes. LoRA after it adds
s·BA inside the bracket as (s·B/c)·A; DoRA scales rows, which changes c alone. So the end is LoRA again when no DoRA was
among them, and otherwise DoRA with m = c·‖W + U·D‖.

It does NOT know models: the base's weights are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heft_engine.adapters.lora.variants import Factors, row_norms
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.errors import BundleError

WeightOf = Callable[[str], Tensor]


def needs_base(adapters: Sequence[LoraWeights]) -> bool:
    """Whether joining them takes the base's weights: norms of rows are not known without."""
    return len(adapters) > 1 and any(adapter.magnitudes is not None for adapter in adapters)


def concatenate(adapters: Sequence[LoraWeights], weight_of: WeightOf | None = None) -> LoraWeights:
    """The adapters, in order, as one of their summed rank; alpha equals rank then.

    `weight_of` gives a module's weight in the base: needed where `needs_base` says so.
    """
    if len(adapters) == 1:
        return adapters[0]
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    rank = sum(adapter.rank for adapter in adapters)
    factors, magnitudes = {}, {}
    for module in modules:
        if needs_base(adapters):
            if weight_of is None:
                raise ValueError("adapters with magnitudes can't be joined without the base's weights")
            weight = weight_of(module).detach().float().cpu()
            factors[module], magnitudes[module] = _joined(adapters, module, weight)
        else:
            factors[module] = _stacked(adapters, module, None)
    first = adapters[0]
    alike = all((a.target_modules, a.layers) == (first.target_modules, first.layers) for a in adapters)
    # Full names where the stages differ: peft would look for every target in every layer.
    return LoraWeights(
        factors=factors,
        scaling=1.0,
        rank=rank,
        alpha=float(rank),
        target_modules=first.target_modules if alike else modules,
        layers=first.layers if alike else None,
        magnitudes=magnitudes or None,
    )


def _joined(adapters: Sequence[LoraWeights], module: str, weight: Tensor) -> tuple[Factors, Tensor]:
    """The factors of the direction and the rows' magnitudes."""
    scale = torch.ones(weight.shape[0])
    scales: list[Tensor] = []
    direction = weight.clone()
    for adapter in adapters:
        scales.append(scale)
        if module not in adapter.factors:
            continue
        if (scale == 0).any():
            raise BundleError(f"a row of {module} has the magnitude 0: what follows can't be joined to it")
        direction += adapter.delta(module) / scale[:, None]
        if adapter.magnitudes is not None:
            scale = adapter.magnitudes[module] / row_norms(direction)
            if (scale == 0).any():
                raise BundleError(
                    f"a row of {module} has the magnitude 0: what follows can't be joined to it"
                )
    return _stacked(adapters, module, scales), scale * row_norms(direction)


def _stacked(adapters: Sequence[LoraWeights], module: str, scales: list[Tensor] | None) -> Factors:
    """A one above the other, s·B (over the rows' scale at its time) side by side; zeros where an adapter has none."""
    downs, ups = [], []
    shapes = next(a.factors[module] for a in adapters if module in a.factors)
    for index, adapter in enumerate(adapters):
        zero = (
            torch.zeros(adapter.rank, shapes[0].shape[1]),
            torch.zeros(shapes[1].shape[0], adapter.rank),
        )
        down, up = adapter.factors.get(module, zero)
        downs.append(down)
        ups.append(adapter.scaling * up if scales is None else adapter.scaling * up / scales[index][:, None])
    return torch.cat(downs), torch.cat(ups, dim=1)
