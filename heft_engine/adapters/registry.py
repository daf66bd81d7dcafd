"""The adapters, by the `type` of the stage that trains them. A new adapter is added here."""

from __future__ import annotations

from heft_engine.adapters.adapter import Adapter
from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.reft import ReftAdapter
from heft_engine.config.train import Stage
from heft_engine.model.packed_lm import PackedLM

ADAPTERS: dict[str, type[Adapter]] = {"lora": LoraAdapter, "reft": ReftAdapter}


def check_stage(lm: PackedLM, stage: Stage) -> None:
    """Raises ConfigError for resolved settings that do not fit the model."""
    ADAPTERS[stage.type].check_stage(lm, stage)


def attach(lm: PackedLM, stage: Stage) -> Adapter:
    """Puts what a stage trains into the model. Raises ConfigError for settings that do not fit it."""
    return ADAPTERS[stage.type].attach(lm, stage)
