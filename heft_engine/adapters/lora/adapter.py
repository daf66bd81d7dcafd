"""LoRA as a stage trains it: peft's layers with this engine's forward pass, merged when the stage ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from peft import PeftModel
from torch import Tensor, nn

from heft_engine.adapters.adapter import Adapter, Boundary, Merge
from heft_engine.adapters.lora import peft_layers
from heft_engine.adapters.lora.linear import use_fused_forward
from heft_engine.adapters.lora.merge import merge_adapter
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.model.nf4 import growth_bytes
from heft_engine.model.packed_lm import PackedLM


@dataclass(kw_only=True)
class LoraAdapter(Adapter):
    """LoRA or DoRA on the stage's target modules, from any of its initialisations."""

    lm: PackedLM
    stage: LoraStage
    peft_model: PeftModel
    merges: ClassVar[bool] = True

    @classmethod
    def check_stage(cls, lm: PackedLM, stage: LoraStage) -> None:
        peft_layers.check_modules(lm, _modules(stage))

    @classmethod
    def attach(cls, lm: PackedLM, stage: LoraStage) -> LoraAdapter:
        peft_model = peft_layers.attach(lm, stage, _modules(stage))
        use_fused_forward(peft_model)
        return cls(lm=lm, stage=stage, peft_model=peft_model)

    def parameters(self) -> dict[str, nn.Parameter]:
        return peft_layers.trainable(self.peft_model)

    def boundary(self) -> Boundary:
        return Boundary(layer=min(self.stage.layers or [0]))

    def train(self, mode: bool) -> None:
        # peft calls its dropout lora_dropout; every other module stays in eval(), as the base has it.
        for name, module in self.peft_model.named_modules():
            if name.endswith("lora_dropout.default"):
                module.train(mode)

    def weights(self) -> LoraWeights:
        return peft_layers.extract(self.peft_model, self.stage, _modules(self.stage))

    def layers(self) -> list[nn.Linear]:
        """Returns the linear layers that the adapter is on."""
        layers = [layer.get_base_layer() for layer in peft_layers.lora_layers(self.peft_model).values()]
        return cast(list[nn.Linear], layers)

    def detach(self) -> None:
        """Takes the adapter out, unmerged."""
        peft_layers.detach(self.peft_model)

    def merge_bytes(self) -> int:
        growth = sum(growth_bytes(layer) for layer in self.layers())
        if self.stage.merge.intruder_scale is None:
            return growth
        originals = sum(layer.in_features * layer.out_features for layer in self.layers())
        return growth + self.lm.dtype.itemsize * originals

    def finish(self, probes: Sequence[Example]) -> Merge[LoraWeights]:
        return merge_adapter(self.lm, self.peft_model, self.stage, self.weights(), probes)

    def no_decay(self) -> set[str]:
        """DoRA's magnitudes: decaying them would shrink the base's weights."""
        return {name for name in self.parameters() if peft_layers.is_magnitude(name)}

    def buffers(self) -> dict[str, Tensor]:
        return peft_layers.initial(self.peft_model)


def _modules(stage: LoraStage) -> list[str]:
    assert stage.target_modules != "auto"
    return stage.target_modules
