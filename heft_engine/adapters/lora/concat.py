"""Concatenates several adapters of one base, merged in order, into one adapter of the same base.

The weight after some merges is c ⊙ (W + U·D), row by row, with c = 1 until a DoRA adapter comes. LoRA after it adds
s·BA inside the bracket as (s·B/c)·A; DoRA scales rows, which changes c alone. So the result is LoRA when no adapter is
DoRA, and otherwise DoRA with m = c·‖W + U·D‖.
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
    """Returns whether `concatenate` needs the base's weights, for the norms of their rows."""
    return len(adapters) > 1 and any(adapter.magnitudes is not None for adapter in adapters)


def concatenate(adapters: Sequence[LoraWeights], weight_of: WeightOf | None = None) -> LoraWeights:
    """Returns the adapters, in order, as one of their summed rank, with alpha equal to rank.

    `weight_of` returns a module's weight in the base; see `needs_base`. Raises BundleError for a magnitude of 0.
    """
    if len(adapters) == 1:
        return adapters[0]
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    rank = sum(adapter.rank for adapter in adapters)
    factors, magnitudes = {}, {}
    for module in modules:
        if needs_base(adapters):
            if weight_of is None:
                raise ValueError("adapters with magnitudes can't be concatenated without the base's weights")
            weight = weight_of(module).detach().float().cpu()
            factors[module], magnitudes[module] = _with_magnitudes(adapters, module, weight)
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


def _with_magnitudes(adapters: Sequence[LoraWeights], module: str, weight: Tensor) -> tuple[Factors, Tensor]:
    """Returns the factors of the direction, and the rows' magnitudes."""
    scale = torch.ones(weight.shape[0])
    scales: list[Tensor] = []
    direction = weight.clone()
    for adapter in adapters:
        scales.append(scale)
        if module not in adapter.factors:
            continue
        _check_scale(scale, module)
        direction += adapter.delta(module) / scale[:, None]
        if adapter.magnitudes is not None:
            scale = adapter.magnitudes[module] / row_norms(direction)
            _check_scale(scale, module)
    return _stacked(adapters, module, scales), scale * row_norms(direction)


def _check_scale(scale: Tensor, module: str) -> None:
    if (scale == 0).any():
        raise BundleError(
            f"a row of {module} has the magnitude 0: no later adapter can be concatenated to it"
        )


def _stacked(adapters: Sequence[LoraWeights], module: str, scales: list[Tensor] | None) -> Factors:
    """Returns all A stacked, and all s·B side by side, divided by the rows' scale at their time.

    An adapter without the module gets zeros.
    """
    downs, ups = [], []
    shapes = next(a.factors[module] for a in adapters if module in a.factors)
    for index, adapter in enumerate(adapters):
        zeros = (
            torch.zeros(adapter.rank, shapes[0].shape[1]),
            torch.zeros(shapes[1].shape[0], adapter.rank),
        )
        down, up = adapter.factors.get(module, zeros)
        downs.append(down)
        ups.append(adapter.scaling * up if scales is None else adapter.scaling * up / scales[index][:, None])
    return torch.cat(downs), torch.cat(ups, dim=1)
