"""Singular values of the adapted weights before and after training, and intruder dimensions.

    spectrum          σ₁ ≥ σ₂ ≥ … of W and of the merged W' (their SVDs)
    stable rank       ‖W‖²_F / σ₁² (Rudelson and Vershynin, arXiv math/0503442)
    relative change   ‖W' − W‖_F / ‖W‖_F
    intruders         among the ten largest singular directions of W', those that no direction of W resembles
                      (heft_engine.adapters.lora.intruders, arXiv 2410.21228), and the strength of each in the final
                      weights, which later stages may have reduced: uᵀW_end·v / σ, 1 if it is unchanged

Every LoRA stage's result is compared with the original base, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from heft_engine.adapters.lora.intruders import EPSILON, TOP, Intruders, find
from heft_engine.adapters.lora.weights import LoraWeights

#: An intruder with less than this share of its strength at the merge counts as repaired by later stages.
REPAIRED = 0.5
#: Singular values of a spectrum that are reported.
MAX_SINGULAR_VALUES = 256


def weight_report(
    adapters: Sequence[LoraWeights], weight_of: Callable[[str], Tensor], on_progress: Callable[[], None]
) -> dict[str, Any]:
    """Reports on all adapted modules. `weight_of` returns a weight of the original base."""
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.factors))
    records = []
    for module in modules:
        records.append(_module(module, adapters, weight_of(module).detach().float().cpu()))
        on_progress()
    stages = [_stage(index, records) for index in range(len(adapters))]
    return {"epsilon": EPSILON, "top": TOP, "stages": stages, "modules": records}


def _module(module: str, adapters: Sequence[LoraWeights], original: Tensor) -> dict[str, Any]:
    weight, by_adapter = original, []
    for index, adapter in enumerate(adapters):
        if module in adapter.factors:
            weight = adapter.merged(module, weight)
            by_adapter.append((index, find(original, weight)))
    return {
        "module": module,
        "shape": list(original.shape),
        "before": _spectrum(by_adapter[0][1].before),
        "after": _spectrum(by_adapter[-1][1].after),
        "relative_change": float((weight - original).norm() / original.norm()),
        "stages": [_intruders(index, intruders, weight) for index, intruders in by_adapter],
    }


def _spectrum(values: Tensor) -> dict[str, Any]:
    stable_rank = float(values.square().sum() / values[0].square())
    return {"singular_values": _rounded(values[:MAX_SINGULAR_VALUES]), "stable_rank": stable_rank}


def _intruders(adapter: int, intruders: Intruders, final_weight: Tensor) -> dict[str, Any]:
    strength = intruders.strength(final_weight)
    return {
        "adapter": adapter,
        "intruders": intruders.count,
        "singular_values": _rounded(intruders.values),
        "strength_at_the_end": _rounded(strength),
        "repaired": int((strength.abs() < REPAIRED).sum()),
        "cosines": _rounded(intruders.cosines),
    }


def _stage(adapter: int, modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over all matrices that the adapter changed."""
    matrices = [stage for module in modules for stage in module["stages"] if stage["adapter"] == adapter]
    directions = sum(len(matrix["cosines"]) for matrix in matrices)
    count = sum(matrix["intruders"] for matrix in matrices)
    return {
        "adapter": adapter,
        "matrices": len(matrices),
        "matrices_with_intruders": sum(matrix["intruders"] > 0 for matrix in matrices),
        "intruders": count,
        "share": count / directions if directions else 0.0,
        "repaired_later": sum(matrix["repaired"] for matrix in matrices),
    }


def _rounded(values: Tensor | Iterable[float]) -> list[float]:
    return [float(f"{float(value):.6g}") for value in values]
