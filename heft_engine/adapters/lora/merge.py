"""Merges a trained LoRA adapter into its base, and checks the result against peft's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from heft_engine.adapters.adapter import Merge
from heft_engine.adapters.lora import peft_layers
from heft_engine.adapters.lora.intruders import repaired
from heft_engine.adapters.lora.weights import LoraWeights, weight_of
from heft_engine.adapters.parity import Parity, ProbeLogits, compare, float32_copy, probe_logits
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM


def merge_adapter(
    lm: PackedLM, peft_model: PeftModel, stage: LoraStage, weights: LoraWeights, examples: Sequence[Example]
) -> Merge[LoraWeights]:
    """Detaches the trained adapter and merges it.

    Where the stage says so, intruder dimensions are scaled after the parity check, which is of what was trained.
    Raises TrainingError (parity_broken).
    """
    scale = stage.merge.intruder_scale
    if scale is None:
        parity = merge_and_verify(lm, peft_model, stage, weights, examples)
        return Merge(weights=weights, record=parity.to_json())
    originals = {module: weight_of(lm.model, module).detach().clone() for module in weights.factors}
    parity = merge_and_verify(lm, peft_model, stage, weights, examples)
    weights, count = repaired(weights, originals.__getitem__, scale)
    with torch.no_grad():
        for module, original in originals.items():
            weight_of(lm.model, module).copy_(original)
    weights.merge_into(lm.model)
    return Merge(weights=weights, record={**parity.to_json(), "intruder_scale": scale, "intruders": count})


def merge_and_verify(
    lm: PackedLM, peft_model: PeftModel, stage: LoraStage, weights: LoraWeights, examples: Sequence[Example]
) -> Parity:
    """Detaches the trained adapter, merges it, and compares. Raises TrainingError (parity_broken)."""
    served = probe_logits(lm, examples)
    parameters = {name: p.detach().clone() for name, p in peft_layers.trainable(peft_model).items()}
    initial = {name: factor.clone() for name, factor in peft_layers.initial(peft_model).items()}
    peft_layers.detach(peft_model)
    exact = float32_copy(lm)
    float32 = _peft_logits(exact, stage, weights.target_modules, parameters, initial, examples)
    adapted = ProbeLogits(served=served, float32=float32)
    _restore(exact, lm, weights)

    weights.merge_into(lm.model)
    served = probe_logits(lm, examples)
    weights.merge_into(exact.model)
    merged = ProbeLogits(served=served, float32=probe_logits(exact, examples))
    return compare(adapted, merged, lm.dtype, len(examples))


def _peft_logits(
    exact: PackedLM,
    stage: LoraStage,
    modules: list[str],
    parameters: dict[str, Tensor],
    initial: dict[str, Tensor],
    examples: Sequence[Example],
) -> Tensor:
    """Returns the probe rows' logits by the raw parameters and peft's forward pass, none of this engine's conversions.

    PiSSA and OLoRA: on W − s·B₀A₀, which is left behind in `exact`.
    """
    peft_model = peft_layers.attach(exact, stage.model_copy(update={"init": "default"}), modules)
    peft_model.eval()  # peft attaches an adapter with its dropout on
    with torch.no_grad():
        for name, parameter in peft_layers.trainable(peft_model).items():
            parameter.copy_(parameters[name])
        for name, down in initial.items():
            module = name.removesuffix(".lora_A")
            if module != name:
                layer = cast(Any, exact.model.get_submodule(module)).base_layer
                layer.weight.sub_(
                    (stage.scaling * initial[f"{module}.lora_B"] @ down).to(layer.weight.device)
                )
    logits = probe_logits(exact, examples)
    peft_layers.detach(peft_model)
    return logits


@torch.no_grad()
def _restore(exact: PackedLM, lm: PackedLM, weights: LoraWeights) -> None:
    """Copies the base's weights of the adapted modules back into its float32 copy."""
    for module in weights.factors:
        weight_of(exact.model, module).copy_(weight_of(lm.model, module))
