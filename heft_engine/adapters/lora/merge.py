"""Merges a trained LoRA adapter into its base, and checks the result against peft's own forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor

from heft_engine.adapters.adapter import Merge
from heft_engine.adapters.lora import peft_layers
from heft_engine.adapters.lora.intruders import repaired
from heft_engine.adapters.lora.weights import LoraWeights, linear_of, weight_of
from heft_engine.adapters.parity import Parity, ProbeStates, compare, probe_states
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model.float32_lm import Float32LM
from heft_engine.model.nf4 import set_weight
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
    for module, original in originals.items():
        set_weight(linear_of(lm.model, module), original)
    weights.merge_into(lm.model)
    return Merge(weights=weights, record={**parity.to_json(), "intruder_scale": scale, "intruders": count})


def merge_and_verify(
    lm: PackedLM, peft_model: PeftModel, stage: LoraStage, weights: LoraWeights, examples: Sequence[Example]
) -> Parity:
    """Detaches the trained adapter, merges it, and compares. Raises TrainingError (parity_broken)."""
    served = probe_states(lm, examples)
    parameters = peft_layers.parameter_copies(peft_model, lm.device)
    initial = {name: factor.to(lm.device) for name, factor in peft_layers.initial(peft_model).items()}
    peft_layers.detach(peft_model)
    exact = _adapted(lm, stage, weights.target_modules, parameters, initial)
    adapted = ProbeStates(served=served, float32=probe_states(exact, examples))

    hashes: dict[str, str] = {}
    float32 = probe_states(merged_in_float32(lm, weights, hashes), examples)
    weights.merge_into(lm.model)
    merged = ProbeStates(served=probe_states(lm, examples), float32=float32)
    parity = compare(lm, adapted, merged, len(examples))
    _check_hashes(lm, hashes)
    return parity


def _adapted(
    lm: PackedLM,
    stage: LoraStage,
    modules: list[str],
    parameters: dict[str, Tensor],
    initial: dict[str, Tensor],
) -> Float32LM:
    """Returns float32 passes by the raw parameters and peft's forward pass, none of this engine's conversions.

    PiSSA and OLoRA: on W − s·B₀A₀.
    """
    exact = Float32LM(lm)
    peft_model = peft_layers.attach(exact, stage.model_copy(update={"init": "default"}), modules)
    peft_model.eval()  # peft attaches an adapter with its dropout on
    peft_layers.assign(peft_model, parameters)
    for module, layer in peft_layers.lora_layers(peft_model).items():
        exact.keep_during(module, layer)  # DoRA reads the base layer's weights outside of its call
        if f"{module}.lora_A" in initial:
            down, up = initial[f"{module}.lora_A"], initial[f"{module}.lora_B"]
            exact.on_load(module, partial(_subtract, layer, stage.scaling, down, up))
    return exact


@torch.no_grad()
def _subtract(layer: Linear, scaling: float, down: Tensor, up: Tensor) -> None:
    layer.base_layer.weight.sub_(scaling * up @ down)


def merged_in_float32(lm: PackedLM, weights: LoraWeights, hashes: dict[str, str] | None = None) -> Float32LM:
    """Returns float32 passes with the adapter merged module by module. It may be attached to the model, which it leaves
    as it is.

    hashes: gets those of the merged weights as the model will have them, rounded to its dtype.
    """
    exact = Float32LM(lm)

    def merge(module: str) -> None:
        weights.of_module(module).merge_into(exact.model)
        if hashes is not None and module not in hashes:
            hashes[module] = _hash(weight_of(exact.model, module).to(lm.dtype))

    for module in weights.factors:
        exact.on_load(module, partial(merge, module))
    return exact


def _check_hashes(lm: PackedLM, hashes: dict[str, str]) -> None:
    """Raises TrainingError (parity_broken) unless the model's merged weights are those of the float32 passes."""
    different = [module for module, digest in hashes.items() if _hash(weight_of(lm.model, module)) != digest]
    if different:
        message = (
            f"the merged weights of {different[0]} are not those that were compared with the trained adapter"
        )
        raise TrainingError(message, code="parity_broken")


def _hash(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
