"""Stage 1's adapter: LoRA through peft, and its merge into the base, in float32.

ΔW = (alpha/rank)·B·A (arXiv 2106.09685). Merging replaces W by cast(float32(W) + ΔW), computed on the CPU from the
very weights the adapter was trained on, so that a bundle rebuilds the same bits. It does NOT know training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heft_engine.config import LoraStage
from heft_engine.errors import BundleError, ConfigError
from heft_engine.model import PackedLM

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """A trained adapter apart from any model. `factors[module] = (A, B)`: (rank, in) and (out, rank), float32, CPU."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scaling: float
    rank: int
    alpha: float
    target_modules: list[str]
    layers: list[int] | None
    base_reference: str | None = None

    def delta(self, module: str) -> Tensor:
        """ΔW of one module, float32, (out, in)."""
        down, up = self.factors[module]
        return self.scaling * (up @ down)

    def save(self, directory: Path) -> None:
        """Writes a directory that peft loads by itself, onto the original base."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for module, (down, up) in self.factors.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = down.contiguous()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = up.contiguous()
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = _peft_config(self.rank, self.alpha, 0.0, self.target_modules, self.layers).to_dict()
        config |= {"base_model_name_or_path": self.base_reference, "inference_mode": True}
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))

    @staticmethod
    def load(directory: Path) -> LoraAdapter:
        """Reads what `save` wrote: names and shapes alone, no class of the config is ever imported."""
        try:
            config = json.loads((directory / ADAPTER_CONFIG).read_text())
            tensors = load_file(directory / ADAPTER_WEIGHTS)
            factors = {}
            for name, down in tensors.items():
                if name.endswith(".lora_A.weight"):
                    module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
                    factors[module] = (down, tensors[name.replace(".lora_A.", ".lora_B.")])
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            return LoraAdapter(
                factors=factors,
                scaling=alpha / rank,
                rank=rank,
                alpha=alpha,
                target_modules=list(config["target_modules"]),
                layers=config.get("layers_to_transform"),
                base_reference=config.get("base_model_name_or_path"),
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
    """Puts a trainable adapter into the model, in place; factors are float32, the base stays frozen.

    Raises ConfigError for modules that this model does not have.
    """
    check_modules(lm, modules)
    config = _peft_config(stage.rank, stage.alpha, stage.dropout, modules, stage.layers)
    adapted = get_peft_model(cast(Any, lm.model), config)
    return cast(PeftModel, adapted)


def trainable(adapted: PeftModel) -> dict[str, nn.Parameter]:
    """The adapter's raw parameters by a stable name."""
    return {
        name.removeprefix(_PREFIX).replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }


def extract(
    adapted: PeftModel, stage: LoraStage, modules: list[str], base_reference: str | None
) -> LoraAdapter:
    """The adapter as it stands, copied to the CPU in float32."""
    parameters = {name: tensor.detach().float().cpu().clone() for name, tensor in trainable(adapted).items()}
    factors = {
        name.removesuffix(".lora_A.weight"): (down, parameters[name.replace(".lora_A.", ".lora_B.")])
        for name, down in parameters.items()
        if name.endswith(".lora_A.weight")
    }
    return LoraAdapter(
        factors=factors,
        scaling=stage.alpha / stage.rank,
        rank=stage.rank,
        alpha=stage.alpha,
        target_modules=modules,
        layers=stage.layers,
        base_reference=base_reference,
    )


def detach(adapted: PeftModel) -> None:
    """Takes the adapter out again, unmerged: the model is its base once more, with the same module objects."""
    cast(Any, adapted.base_model).unload()


@torch.no_grad()
def merge(model: nn.Module, adapter: LoraAdapter) -> None:
    """W ← cast(float32(W) + ΔW) for every adapted module, in place. Raises BundleError on a foreign adapter."""
    for module in adapter.factors:
        try:
            weight = cast(Tensor, model.get_submodule(module).weight)
        except AttributeError as error:
            raise BundleError(f"the adapter names {module}, which this base model does not have") from error
        delta = adapter.delta(module)
        if delta.shape != weight.shape:
            raise BundleError(
                f"the adapter's {module} is {tuple(delta.shape)}, the base's {tuple(weight.shape)}"
            )
        weight.copy_((weight.float().cpu() + delta).to(weight.dtype))


def concatenate(adapters: list[LoraAdapter]) -> LoraAdapter:
    """Several adapters of one base as one: A stacked, s·B side by side, so that ΔW adds up. alpha equals rank then."""
    if len(adapters) == 1:
        return adapters[0]
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    rank = sum(adapter.rank for adapter in adapters)
    factors = {}
    for module in modules:
        downs, ups = [], []
        for adapter in adapters:
            shapes = next(a.factors[module] for a in adapters if module in a.factors)
            zero = (
                torch.zeros(adapter.rank, shapes[0].shape[1]),
                torch.zeros(shapes[1].shape[0], adapter.rank),
            )
            down, up = adapter.factors.get(module, zero)
            downs.append(down)
            ups.append(adapter.scaling * up)
        factors[module] = (torch.cat(downs), torch.cat(ups, dim=1))
    first = adapters[0]
    alike = all((a.target_modules, a.layers) == (first.target_modules, first.layers) for a in adapters)
    # Full names where the stages differ: peft would look for every target in every layer.
    return LoraAdapter(
        factors=factors,
        scaling=1.0,
        rank=rank,
        alpha=float(rank),
        target_modules=first.target_modules if alike else modules,
        layers=first.layers if alike else None,
        base_reference=first.base_reference,
    )


def _peft_config(
    rank: int, alpha: float, dropout: float, modules: list[str], layers: list[int] | None
) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=dropout,
        target_modules=list(modules),
        layers_to_transform=layers,
        layers_pattern="layers" if layers is not None else None,
    )


def _adaptable(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in name
