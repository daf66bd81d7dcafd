"""peft's LoRA layers inside a model: attached, read and taken out again."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora import model as peft_lora_model
from torch import Tensor, nn

from heft_engine.adapters.lora.variants import Factors, initial_factors, row_norms, widened
from heft_engine.adapters.lora.weights import MAGNITUDE, PREFIX, LoraWeights, peft_config
from heft_engine.config.train import LoraStage
from heft_engine.errors import ConfigError
from heft_engine.model.packed_lm import PackedLM

_SIDES = ("lora_A", "lora_B")


def check_modules(lm: PackedLM, modules: list[str]) -> None:
    """Raises ConfigError naming the modules that this model's layers do not have, and those they have."""
    linear = [name for name, module in lm.model.named_modules() if _is_adaptable(name, module)]
    # peft is content when one of several names exists, and adapts a head that is tied to the embedding.
    missing = [module for module in modules if not any(f".{name}".endswith(f".{module}") for name in linear)]
    if missing:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        message = f"no module in this model's layers is named {', '.join(missing)}; they have {known}"
        raise ConfigError(message, param="lora.target_modules")


def attach(lm: PackedLM, stage: LoraStage, modules: list[str]) -> PeftModel:
    """Puts a trainable adapter into the model, in place; its parameters are float32, the base stays frozen.

    PiSSA's and OLoRA's A₀ and B₀ are kept as buffers beside A and B, and W whole. peft's own forward pass does not
    know that; heft_engine.adapters.lora.linear's does. Raises ConfigError for modules that this model does not have.
    """
    check_modules(lm, modules)
    # bitsandbytes, which peft would import here, takes two seconds. Its layers never occur (heft_engine.model.nf4).
    with (
        patch.object(peft_lora_model, "is_bnb_available", bool),
        patch.object(peft_lora_model, "is_bnb_4bit_available", bool),
    ):
        peft_model = cast(PeftModel, get_peft_model(cast(Any, lm.model), peft_config(stage, modules)))
    for name, layer in lora_layers(peft_model).items():
        weight = layer.base_layer.weight
        if stage.use_dora:
            # peft takes the norm in the model's dtype; in bfloat16 that is not the row's norm.
            layer.lora_magnitude_vector["default"].weight.data = row_norms(weight.detach().float())
        if stage.init != "default":
            _set_initial_factors(layer, stage, name)
            lm.on_forward()  # decompositions of large weights take minutes
    return peft_model


def _set_initial_factors(layer: Linear, stage: LoraStage, name: str) -> None:
    weight = layer.base_layer.weight
    if stage.rank > min(weight.shape):
        shape = " by ".join(map(str, weight.shape))
        message = f"lora.rank is {stage.rank}, but {name} is {shape}: init {stage.init} can't take more of it"
        raise ConfigError(message, param="lora.rank")
    factors = initial_factors(weight, stage.rank, stage.scaling, stage.init)
    for side, factor in zip(_SIDES, factors, strict=True):
        getattr(layer, side)["default"].weight.data.copy_(factor)
        layer.register_buffer(f"{side}_initial", factor, persistent=False)


def initial(peft_model: PeftModel) -> dict[str, Tensor]:
    """Returns A₀ and B₀ of every adapted module by a stable name; nothing where training begins at ΔW = 0."""
    return {
        f"{name}.{side}": factor
        for name, layer in lora_layers(peft_model).items()
        for side, factor in zip(_SIDES, initial_of(layer) or (), strict=False)
    }


def initial_of(layer: Linear) -> Factors | None:
    """Returns (A₀, B₀) of one adapted layer."""
    down, up = (getattr(layer, f"{side}_initial", None) for side in _SIDES)
    return None if down is None or up is None else (down, up)


def trainable(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """Returns the adapter's raw parameters by a stable name."""
    return {
        name.removeprefix(PREFIX).replace(".default", ""): parameter
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }


def parameter_copies(peft_model: PeftModel, device: torch.device) -> dict[str, Tensor]:
    """Returns copies of the adapter's raw parameters, by the names that `assign` takes."""
    return {
        name: parameter.detach().to(device, copy=True)
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }


def assign(peft_model: PeftModel, parameters: dict[str, Tensor]) -> None:
    """Puts raw parameters in the place of an adapter's own."""
    unknown = peft_model.load_state_dict(parameters, strict=False, assign=True).unexpected_keys
    assert not unknown, f"the adapter has no parameters named {', '.join(unknown)}"


def is_magnitude(name: str) -> bool:
    """Returns whether one of `trainable`'s names is DoRA's m."""
    return MAGNITUDE in name


def extract(peft_model: PeftModel, stage: LoraStage, modules: list[str]) -> LoraWeights:
    """Returns a copy of the adapter, float32 on the CPU, relative to the weights that the stage started from."""
    factors, magnitudes = {}, {}
    for name, layer in lora_layers(peft_model).items():
        down, up = (_copy(getattr(layer, side)["default"].weight) for side in _SIDES)
        start = initial_of(layer)
        factors[name] = (
            (down, up) if start is None else widened((down, up), (_copy(start[0]), _copy(start[1])))
        )
        if stage.use_dora:
            magnitudes[name] = _copy(layer.lora_magnitude_vector["default"].weight)
    rank = stage.rank if stage.init == "default" else 2 * stage.rank
    alpha = stage.scaling * rank if stage.use_rslora else stage.alpha * (rank // stage.rank)
    return LoraWeights(
        factors=factors,
        scaling=alpha / rank,
        rank=rank,
        alpha=alpha,
        target_modules=modules,
        layers=stage.layers,
        magnitudes=magnitudes if stage.use_dora else None,
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def detach(peft_model: PeftModel) -> None:
    """Takes the adapter out, unmerged: the model is its base again, with the same module objects.

    peft's `unload` does the same and assigns each layer its own weight, of which a quantised layer has no tensor.
    """
    model: Any = peft_model.get_base_model()
    for name, layer in lora_layers(peft_model).items():
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def lora_layers(peft_model: PeftModel) -> dict[str, Linear]:
    """Returns the adapted layers by the names that they have in the model."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in peft_model.named_modules()
        if isinstance(module, Linear)
    }


def _is_adaptable(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in name
