"""What a stage trains, seen by the loop: LoRA's factors, or ReFT's R, W and b. Attached here, taken off here.

It does NOT know the loop, data or files.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn

from heft_engine.adapters.lora import linear as lora_linear
from heft_engine.adapters.lora import peft_layers as lora
from heft_engine.adapters.reft import KINDS
from heft_engine.config.train import LoraStage, ReftStage
from heft_engine.model.auto_settings import stage_layers
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.activation_cache import Boundary


@dataclass(kw_only=True)
class LoraAdapter:
    """An adapter inside the model. Both factors may decay; DoRA's magnitudes would take the weights along."""

    adapted: PeftModel
    layers: list[int]

    @staticmethod
    def attach(lm: PackedLM, stage: LoraStage) -> LoraAdapter:
        assert stage.target_modules != "auto"
        layers = stage.layers or list(range(lm.n_layers))
        adapted = lora.attach(lm, stage, stage.target_modules)
        lora_linear.speed_up(adapted)
        return LoraAdapter(adapted=adapted, layers=layers)

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
class ReftAdapter:
    """The interventions of one stage, one for each layer, hooked into the model."""

    interventions: list[PlacedIntervention]
    boundary_interventions: list[PlacedIntervention]

    @staticmethod
    def attach(lm: PackedLM, stage: ReftStage) -> ReftAdapter:
        """Goes on with the interventions that stand at the same place with the same shape, adds the others."""
        interventions = []
        for layer in stage_layers(stage):
            fresh = KINDS[stage.kind](lm.hidden_size, stage.rank, stage.dropout).to(lm.device)
            placed = PlacedIntervention(layer=layer, positions=stage.positions, intervention=fresh)
            standing = next((old for old in lm.interventions if old.same_place(placed)), None)
            if standing is None:
                lm.interventions.add(placed)
                standing = placed
            standing.intervention.dropout.p = stage.dropout
            standing.intervention.unfreeze()
            interventions.append(standing)
        return ReftAdapter(
            interventions=interventions,
            boundary_interventions=_from_first(interventions, list(lm.interventions)),
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{index}.{name}": parameter
            for index, placed in enumerate(self.interventions)
            for name, parameter in placed.intervention.named_parameters()
        }

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        pairs = [placed.intervention.parameter_groups() for placed in self.interventions]
        return [p for decay, _ in pairs for p in decay], [p for _, plain in pairs for p in plain]

    def buffers(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": buffer
            for index, placed in enumerate(self.interventions)
            for name, buffer in placed.intervention.named_buffers()
        }

    def train(self, mode: bool) -> None:
        for placed in self.interventions:
            placed.intervention.dropout.train(mode)

    def check(self) -> None:
        for placed in self.interventions:
            placed.intervention.check()

    def boundary(self) -> Boundary:
        layer = min(placed.layer for placed in self.interventions)
        return Boundary(
            layer=layer + 1,
            interventions=tuple(self.boundary_interventions),
            positions=tuple(placed.positions for placed in self.interventions),
            clear_above=self.boundary_interventions == self.interventions,
        )

    def freeze(self) -> None:
        for placed in self.interventions:
            placed.intervention.freeze()
            placed.intervention.dropout.eval()


def attach(lm: PackedLM, stage: LoraStage | ReftStage) -> LoraAdapter | ReftAdapter:
    """What a stage trains, put into the model."""
    return LoraAdapter.attach(lm, stage) if isinstance(stage, LoraStage) else ReftAdapter.attach(lm, stage)


def _from_first(
    trained: list[PlacedIntervention], standing: list[PlacedIntervention]
) -> list[PlacedIntervention]:
    """What acts at the lowest trained layer from the first trained intervention on, in the order of acting."""
    layer = min(placed.layer for placed in trained)
    here = [placed for placed in standing if placed.layer == layer]
    return here[min(here.index(placed) for placed in trained if placed.layer == layer) :]
