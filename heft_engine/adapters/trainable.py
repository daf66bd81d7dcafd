"""What a stage trains, seen by the loop: LoRA's factors, or ReFT's R, W and b. Attached here, taken off here.

It does NOT know the loop, data or files.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn

from heft_engine.adapters import lora, lora_linear
from heft_engine.adapters.reft import KINDS
from heft_engine.config.train import LoraStage, ReftStage
from heft_engine.model.auto_settings import stage_layers
from heft_engine.model.interventions import Site
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.activation_cache import Boundary


@dataclass(kw_only=True)
class LoraTrainable:
    """An adapter inside the model. Both factors may decay; DoRA's magnitudes would take the weights along."""

    adapted: PeftModel
    layers: list[int]

    @staticmethod
    def attach(lm: PackedLM, stage: LoraStage) -> LoraTrainable:
        assert stage.target_modules != "auto"
        layers = stage.layers or list(range(lm.n_layers))
        adapted = lora.attach(lm, stage, stage.target_modules)
        lora_linear.speed_up(adapted)
        return LoraTrainable(adapted=adapted, layers=layers)

    def parameters(self) -> dict[str, nn.Parameter]:
        return lora.trainable(self.adapted)

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        named = self.parameters().items()
        decay = [parameter for name, parameter in named if not lora.is_magnitude(name)]
        return decay, [parameter for name, parameter in named if lora.is_magnitude(name)]

    def buffers(self) -> dict[str, Tensor]:
        return lora.initial(self.adapted)

    def train(self, mode: bool) -> None:
        # peft calls its dropout lora_dropout; every other module stays as the base has it, in eval().
        for name, module in self.adapted.named_modules():
            if name.endswith("lora_dropout.default"):
                module.train(mode)

    def check(self) -> None:
        """LoRA has no constraint to keep."""

    def boundary(self) -> Boundary:
        return Boundary(layer=min(self.layers))


@dataclass(kw_only=True)
class ReftTrainable:
    """The interventions of one stage, one for each layer, hooked into the model."""

    sites: list[Site]
    boundary_sites: list[Site]

    @staticmethod
    def attach(lm: PackedLM, stage: ReftStage) -> ReftTrainable:
        """Goes on with the interventions that stand at the same place with the same shape, adds the others."""
        sites = []
        for layer in stage_layers(stage):
            fresh = KINDS[stage.kind](lm.hidden_size, stage.rank, stage.dropout).to(lm.device)
            site = Site(layer=layer, positions=stage.positions, intervention=fresh)
            standing = next((old for old in lm.sites if old.same_place(site)), None)
            if standing is None:
                lm.sites.add(site)
                standing = site
            standing.intervention.dropout.p = stage.dropout
            standing.intervention.thaw()
            sites.append(standing)
        return ReftTrainable(sites=sites, boundary_sites=_from_first(sites, list(lm.sites)))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{index}.{name}": parameter
            for index, site in enumerate(self.sites)
            for name, parameter in site.intervention.named_parameters()
        }

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        pairs = [site.intervention.parameter_groups() for site in self.sites]
        return [p for decay, _ in pairs for p in decay], [p for _, plain in pairs for p in plain]

    def buffers(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": buffer
            for index, site in enumerate(self.sites)
            for name, buffer in site.intervention.named_buffers()
        }

    def train(self, mode: bool) -> None:
        for site in self.sites:
            site.intervention.dropout.train(mode)

    def check(self) -> None:
        for site in self.sites:
            site.intervention.check()

    def boundary(self) -> Boundary:
        layer = min(site.layer for site in self.sites)
        return Boundary(
            layer=layer + 1,
            sites=tuple(self.boundary_sites),
            positions=tuple(site.positions for site in self.sites),
            clear_above=self.boundary_sites == self.sites,
        )

    def freeze(self) -> None:
        for site in self.sites:
            site.intervention.freeze()
            site.intervention.dropout.eval()


def attach(lm: PackedLM, stage: LoraStage | ReftStage) -> LoraTrainable | ReftTrainable:
    """What a stage trains, put into the model."""
    return (
        LoraTrainable.attach(lm, stage) if isinstance(stage, LoraStage) else ReftTrainable.attach(lm, stage)
    )


def _from_first(trained: list[Site], standing: list[Site]) -> list[Site]:
    """What acts at the lowest trained layer from the first trained intervention on, in the order of acting."""
    layer = min(site.layer for site in trained)
    here = [site for site in standing if site.layer == layer]
    return here[min(here.index(site) for site in trained if site.layer == layer) :]
