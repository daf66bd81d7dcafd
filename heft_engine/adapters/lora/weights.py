"""A trained LoRA or DoRA adapter apart from any model: its files, and its merge into base weights.

ΔW = (alpha/rank)·B·A (arXiv 2106.09685). Merging replaces W by cast(float32(W) + ΔW), its rows scaled to DoRA's
magnitudes where there are any. It is computed on the CPU from the very weights that the adapter was trained on, so a
bundle rebuilds the same bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heft_engine.adapters.lora.variants import Factors, with_magnitude
from heft_engine.config.train import LoraStage
from heft_engine.errors import BundleError
from heft_engine.model.nf4 import set_weight

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
#: Before a module's name in peft's files and models.
PREFIX = "base_model.model."
#: peft's name of DoRA's magnitudes.
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """factors[module]: (A, B) of shapes (rank, in) and (out, rank), float32, on the CPU.

    magnitudes[module]: DoRA's m, shape (out,), for every module; None for LoRA.
    """

    factors: dict[str, Factors]
    scaling: float
    rank: int
    alpha: float
    target_modules: list[str]
    layers: list[int] | None
    magnitudes: dict[str, Tensor] | None = None

    def delta(self, module: str) -> Tensor:
        """Returns s·B·A of one module, float32, (out, in): LoRA's whole change, DoRA's change of direction."""
        down, up = self.factors[module]
        return self.scaling * (up @ down)

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """Returns a module's weight with the adapter merged: float32, on the CPU.

        Raises BundleError when their shapes differ.
        """
        delta = self.delta(module)
        if delta.shape != weight.shape:
            shapes = f"{tuple(delta.shape)}, the base's {tuple(weight.shape)}"
            raise BundleError(f"the adapter's {module} is {shapes}")
        changed = weight.float().cpu() + delta
        return changed if self.magnitudes is None else with_magnitude(changed, self.magnitudes[module])

    def of_module(self, module: str) -> LoraWeights:
        """Returns the adapter of one module alone."""
        magnitudes = None if self.magnitudes is None else {module: self.magnitudes[module]}
        return replace(self, factors={module: self.factors[module]}, magnitudes=magnitudes)

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Merges into the model's weights, in place. Raises BundleError when the adapter is for another model."""
        for module in self.factors:
            linear = linear_of(model, module)
            set_weight(linear, self.merged(module, linear.weight))

    def save(self, directory: Path, base_reference: str | None = None) -> None:
        """Writes a directory that peft loads by itself, onto the original base (`base_reference`)."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for module, (down, up) in self.factors.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = down.contiguous()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = up.contiguous()
        for module, magnitude in (self.magnitudes or {}).items():
            tensors[f"{PREFIX}{module}.{MAGNITUDE}"] = magnitude.contiguous()
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        stage = LoraStage(layers=self.layers, use_dora=self.magnitudes is not None)
        config = peft_config(stage, self.target_modules).to_dict()
        config |= {"r": self.rank, "lora_alpha": self.alpha}
        config |= {"base_model_name_or_path": base_reference, "inference_mode": True}
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))

    @staticmethod
    def load(directory: Path) -> LoraWeights:
        """Reads what `save` wrote: names and shapes alone, no class of the config is ever imported.

        Raises BundleError.
        """
        try:
            config = json.loads((directory / ADAPTER_CONFIG).read_text())
            tensors = load_file(directory / ADAPTER_WEIGHTS)
            factors = {}
            for name, down in tensors.items():
                if name.endswith(".lora_A.weight"):
                    module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                    factors[module] = (down, tensors[name.replace(".lora_A.", ".lora_B.")])
            magnitudes = None
            if config.get("use_dora"):
                magnitudes = {module: tensors[f"{PREFIX}{module}.{MAGNITUDE}"] for module in factors}
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            return LoraWeights(
                factors=factors,
                scaling=alpha / rank,
                rank=rank,
                alpha=alpha,
                target_modules=list(config["target_modules"]),
                layers=config.get("layers_to_transform"),
                magnitudes=magnitudes,
            )
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise BundleError(f"the adapter in {directory.name} can't be read: {error}") from error


def linear_of(model: nn.Module, module: str) -> nn.Linear:
    """Returns a linear layer by its name, without an adapter that is on it.

    Raises BundleError for a name that this model does not have.
    """
    try:
        linear: nn.Module | None = model.get_submodule(module)
    except AttributeError:
        linear = None
    linear = getattr(linear, "base_layer", linear)
    if not isinstance(linear, nn.Linear):
        raise BundleError(f"the adapter names {module}, which is no linear layer of this base model")
    return linear


def weight_of(model: nn.Module, module: str) -> Tensor:
    """Returns a linear layer's weight. Raises BundleError for a name that this model does not have."""
    return linear_of(model, module).weight


def peft_config(stage: LoraStage, modules: list[str]) -> LoraConfig:
    """Returns peft's settings for a stage's adapter."""
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
