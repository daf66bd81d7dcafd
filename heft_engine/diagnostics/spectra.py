"""Singular values of the adapted weights before and after, and what came into them.

    spectrum          σ₁ ≥ σ₂ ≥ … of W and of the merged W' (their SVDs)
    stable rank       ‖W‖²_F / σ₁² (Rudelson and Vershynin, arXiv math/0503442)
    relative change   ‖W' − W‖_F / ‖W‖_F
    intruders         heft_engine.adapters.lora.intruders (arXiv 2410.21228): directions among the ten largest of W'
    that W has
                      nothing like; and how strong each still is in the last weights, which later stages may have
                      changed: uᵀW_end·v / σ, 1 where nothing repaired it

Every LoRA stage's result is compared with the original base, as the paper does. It does NOT know models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from heft_engine.adapters.lora.intruders import EPSILON, TOP, Intruders, find
from heft_engine.adapters.lora.weights import LoraWeights

#: Below this share of its strength at the merge, an intruder counts as repaired by what came later.
REPAIRED = 0.5
#: Singular values of a spectrum that are told.
TOLD = 256


def weight_report(
    adapters: Sequence[LoraWeights], weight_of: Callable[[str], Tensor], told: Callable[[], None]
) -> dict[str, Any]:
    """Of all adapted modules; `weight_of` gives the original base's weights. `told` is called for each module."""
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.factors))
    records = []
    for module in modules:
        records.append(_module(module, adapters, weight_of(module).detach().float().cpu()))
        told()
    stages = [_stage(index, records) for index in range(len(adapters))]
    return {"epsilon": EPSILON, "top": TOP, "stages": stages, "modules": records}


def _module(module: str, adapters: Sequence[LoraWeights], original: Tensor) -> dict[str, Any]:
    weight, found = original, []
    for index, adapter in enumerate(adapters):
        if module in adapter.factors:
            weight = adapter.merged(module, weight)
            found.append((index, find(original, weight)))
    return {
        "module": module,
        "shape": list(original.shape),
        "before": _spectrum(found[0][1].before),
        "after": _spectrum(found[-1][1].after),
        "relative_change": float((weight - original).norm() / original.norm()),
        "stages": [_intruders(index, one, weight) for index, one in found],
    }


def _spectrum(values: Tensor) -> dict[str, Any]:
    stable_rank = float(values.square().sum() / values[0].square())
    return {"singular_values": _rounded(values[:TOLD]), "stable_rank": stable_rank}


def _intruders(stage: int, one: Intruders, end: Tensor) -> dict[str, Any]:
    strength = one.strength(end)
    return {
        "adapter": stage,
        "intruders": one.count,
        "singular_values": _rounded(one.values),
        "strength_at_the_end": _rounded(strength),
        "repaired": int((strength.abs() < REPAIRED).sum()),
        "cosines": _rounded(one.cosines),
    }


def _stage(adapter: int, modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count and share over all the matrices that this adapter changed."""
    mine = [stage for module in modules for stage in module["stages"] if stage["adapter"] == adapter]
    looked_at = sum(len(stage["cosines"]) for stage in mine)
    count = sum(stage["intruders"] for stage in mine)
    return {
        "adapter": adapter,
        "matrices": len(mine),
        "matrices_with_intruders": sum(stage["intruders"] > 0 for stage in mine),
        "intruders": count,
        "share": count / looked_at if looked_at else 0.0,
        "repaired_later": sum(stage["repaired"] for stage in mine),
    }


def _rounded(values: Tensor | Iterable[float]) -> list[float]:
    return [float(f"{float(value):.6g}") for value in values]
