"""Stage 1's adapter: LoRA or DoRA through peft, and its merge into the base, in float32.

ΔW = (alpha/rank)·B·A (arXiv 2106.09685). Merging replaces W by cast(float32(W) + ΔW), its rows brought to DoRA's
magnitudes where there are any, computed on the CPU from the very weights the adapter was trained on, so that a bundle
rebuilds the same bits. It does NOT know training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heft_engine.adapters.lora.variants import Factors, initial_factors, row_norms, widened, with_magnitude
from heft_engine.config.train import LoraStage
from heft_engine.errors import BundleError, ConfigError
from heft_engine.model.packed_lm import PackedLM

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """A trained adapter apart from any model. `factors[module] = (A, B)`: (rank, in) and (out, rank), float32, CPU.

    `magnitudes[module]`, DoRA's m: (out,), of every module, or None for LoRA.
    """

    factors: dict[str, Factors]
    scaling: float
    rank: int
    alpha: float
    target_modules: list[str]
    layers: list[int] | None
    base_reference: str | None = None
    magnitudes: dict[str, Tensor] | None = None

    def delta(self, module: str) -> Tensor:
        """s·B·A of one module, float32, (out, in): its whole change, or DoRA's change of direction."""
        down, up = self.factors[module]
        return self.scaling * (up @ down)

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """What the adapter makes of a module's weight: float32, CPU. Raises BundleError when it does not fit."""
        delta = self.delta(module)
        if delta.shape != weight.shape:
            shapes = f"{tuple(delta.shape)}, the base's {tuple(weight.shape)}"
            raise BundleError(f"the adapter's {module} is {shapes}")
        changed = weight.float().cpu() + delta
        return changed if self.magnitudes is None else with_magnitude(changed, self.magnitudes[module])

    def save(self, directory: Path) -> None:
        """Writes a directory that peft loads by itself, onto the original base."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for module, (down, up) in self.factors.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = down.contiguous()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = up.contiguous()
        for module, magnitude in (self.magnitudes or {}).items():
            tensors[f"{_PREFIX}{module}.{_MAGNITUDE}"] = magnitude.contiguous()
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        stage = LoraStage(layers=self.layers, use_dora=self.magnitudes is not None)
        config = _peft_config(stage, self.target_modules).to_dict() | {
            "r": self.rank,
            "lora_alpha": self.alpha,
        }
        config |= {"base_model_name_or_path": self.base_reference, "inference_mode": True}
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))

    @staticmethod
    def load(directory: Path) -> LoraWeights:
        """Reads what `save` wrote: names and shapes alone, no class of the config is ever imported."""
        try:
            config = json.loads((directory / ADAPTER_CONFIG).read_text())
            tensors = load_file(directory / ADAPTER_WEIGHTS)
            factors = {}
            for name, down in tensors.items():
                if name.endswith(".lora_A.weight"):
                    module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
                    factors[module] = (down, tensors[name.replace(".lora_A.", ".lora_B.")])
            magnitudes = None
            if config.get("use_dora"):
                magnitudes = {module: tensors[f"{_PREFIX}{module}.{_MAGNITUDE}"] for module in factors}
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            return LoraWeights(
                factors=factors,
                scaling=alpha / rank,
                rank=rank,
                alpha=alpha,
                target_modules=list(config["target_modules"]),
                layers=config.get("layers_to_transform"),
                base_reference=config.get("base_model_name_or_path"),
                magnitudes=magnitudes,
            )
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise BundleError(f"the adapter in {directory.name} can't be read: {error}") from error


def check_modules(lm: PackedLM, modules: list[str]) -> None:
    """Raises ConfigError naming the modules that this model's layers do not have, and those they have."""
    linear = [name for name, part in lm.model.named_modules() if _adaptable(name, part)]
    # peft is content when one of several names is found, and adapts a head that is tied to the embedding.
    missing = [module for module in modules if not any(f".{name}".endswith(f".{module}") for name in linear)]
    if missing:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        message = f"no module in this model's layers is named {', '.join(missing)}; they have {known}"
        raise ConfigError(message, param="lora.target_modules")


def attach(lm: PackedLM, stage: LoraStage, modules: list[str]) -> PeftModel:
    """Puts a trainable adapter into the model, in place; its parameters are float32, the base stays frozen.

    PiSSA's and OLoRA's A₀ and B₀ are kept beside A and B (`initial`), and W whole: peft's own forward pass does not
    know that. heft_engine.adapters.lora.linear's does. Raises ConfigError for modules that this model does not have.
    """
    check_modules(lm, modules)
    adapted = cast(PeftModel, get_peft_model(cast(Any, lm.model), _peft_config(stage, modules)))
    for name, module in _layers(adapted).items():
        weight = module.base_layer.weight
        if stage.use_dora:
            # peft takes the norm in the model's dtype: in bfloat16, not what the row's norm is.
            module.lora_magnitude_vector["default"].weight.data = row_norms(weight.detach().float())
        if stage.init != "default":
            _begin(module, stage, name)
            lm.on_forward()  # decompositions of large weights take minutes
    return adapted


def _begin(module: Linear, stage: LoraStage, name: str) -> None:
    weight = module.base_layer.weight
    if stage.rank > min(weight.shape):
        shape = " by ".join(map(str, weight.shape))
        message = f"lora.rank is {stage.rank}, but {name} is {shape}: init {stage.init} can't take more of it"
        raise ConfigError(message, param="lora.rank")
    initial = initial_factors(weight, stage.rank, stage.scaling, stage.init)
    for side, factor in zip(_SIDES, initial, strict=True):
        getattr(module, side)["default"].weight.data.copy_(factor)
        module.register_buffer(f"{side}_initial", factor, persistent=False)


def initial(adapted: PeftModel) -> dict[str, Tensor]:
    """A₀ and B₀ of every adapted module by a stable name; nothing where they begin at ΔW = 0."""
    return {
        f"{name}.{side}": tensor
        for name, module in _layers(adapted).items()
        for side, tensor in zip(_SIDES, initial_of(module) or (), strict=False)
    }


def initial_of(module: Linear) -> Factors | None:
    """(A₀, B₀) of one adapted layer."""
    found = [getattr(module, f"{side}_initial", None) for side in _SIDES]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def trainable(adapted: PeftModel) -> dict[str, nn.Parameter]:
    """The adapter's raw parameters by a stable name."""
    return {
        name.removeprefix(_PREFIX).replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }


def is_magnitude(name: str) -> bool:
    """Whether one of `trainable`'s names is DoRA's m."""
    return _MAGNITUDE in name


def extract(
    adapted: PeftModel, stage: LoraStage, modules: list[str], base_reference: str | None
) -> LoraWeights:
    """The adapter as it stands, copied to the CPU in float32, on the weights that the stage found."""
    factors, magnitudes = {}, {}
    for name, module in _layers(adapted).items():
        down, up = (_copy(getattr(module, side)["default"].weight) for side in _SIDES)
        begun = initial_of(module)
        factors[name] = (
            (down, up) if begun is None else widened((down, up), (_copy(begun[0]), _copy(begun[1])))
        )
        if stage.use_dora:
            magnitudes[name] = _copy(module.lora_magnitude_vector["default"].weight)
    rank = stage.rank if stage.init == "default" else 2 * stage.rank
    alpha = stage.scaling * rank if stage.use_rslora else stage.alpha * (rank // stage.rank)
    return LoraWeights(
        factors=factors,
        scaling=alpha / rank,
        rank=rank,
        alpha=alpha,
        target_modules=modules,
        layers=stage.layers,
        base_reference=base_reference,
        magnitudes=magnitudes if stage.use_dora else None,
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def detach(adapted: PeftModel) -> None:
    """Takes the adapter out again, unmerged: the model is its base once more, with the same module objects."""
    cast(Any, adapted.base_model).unload()


@torch.no_grad()
def merge(model: nn.Module, adapter: LoraWeights) -> None:
    """W ← cast(what the adapter makes of float32(W)) for every adapted module, in place.

    Raises BundleError on a foreign adapter.
    """
    for module in adapter.factors:
        weight = weight_of(model, module)
        weight.copy_(adapter.merged(module, weight).to(weight.dtype))


def weight_of(model: nn.Module, module: str) -> Tensor:
    """Raises BundleError for a module that this model does not have."""
    try:
        return cast(Tensor, model.get_submodule(module).weight)
    except AttributeError as error:
        raise BundleError(f"the adapter names {module}, which this base model does not have") from error


def _peft_config(stage: LoraStage, modules: list[str]) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=stage.rank,
        lora_alpha=cast(int, stage.alpha),
        lora_dropout=stage.dropout,
        target_modules=list(modules),
        layers_to_transform=stage.layers,
        layers_pattern="layers" if stage.layers is not None else None,
        use_rslora=stage.use_rslora,
        use_dora=stage.use_dora,
    )


def _layers(adapted: PeftModel) -> dict[str, Linear]:
    """The adapted layers by the names that they have in the model."""
    return {
        name.removeprefix(_PREFIX): module
        for name, module in adapted.named_modules()
        if isinstance(module, Linear)
    }


def _adaptable(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in name
