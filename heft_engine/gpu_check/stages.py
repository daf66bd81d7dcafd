"""Stages of the large model on random rows, as parts of the check train them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.registry import attach
from heft_engine.config.train import LoraStage, ReftStage, Stage
from heft_engine.events import Event
from heft_engine.gpu_check.shapes import random_examples
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.loop import Hooks
from heft_engine.training.plan import StagePlan
from heft_engine.training.stage import train_stage
from heft_engine.training.stage_inputs import StageInputs

#: Of a stage's steps, those that are not timed: kernels are chosen and memory is taken.
_WARM_UP = 2


def lora_stage(lm: PackedLM, **settings: Any) -> LoraStage:
    return LoraStage(learning_rate=1e-3, target_modules=list(lm.family.attention), n_epochs=1, **settings)


def reft_stage(lm: PackedLM, **settings: Any) -> ReftStage:
    return ReftStage(learning_rate=1e-3, layers=[lm.n_layers // 2 - 1], n_epochs=1, **settings)


def stage_inputs(lm: PackedLM, stage: Stage, lengths: Sequence[int]) -> StageInputs:
    """Returns a stage, its adapter attached, on rows of random tokens with answers of one token."""
    rows = [example.supervised() for example in random_examples(lengths, lm.config.vocab_size, answers=(1,))]
    return StageInputs(
        lm=lm,
        stage=stage,
        index=0,
        seed=0,
        adapter=attach(lm, stage),
        standing=(),
        examples=rows,
        validation=[],
        total_steps=-(-len(rows) // stage.batch_size),
    )


def detach(inputs: StageInputs) -> None:
    """Leaves the model as it was before the stage."""
    if isinstance(inputs.adapter, LoraAdapter):
        inputs.adapter.detach()
    inputs.lm.interventions.clear()


@dataclass(kw_only=True)
class Training:
    """The events of a stage that has been trained."""

    events: list[Event] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        steps = [event.data for event in self.events if event.code == "METRICS"]
        first, last = steps[min(_WARM_UP, len(steps) - 2)], steps[-1]
        return float((last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]))

    @property
    def warnings(self) -> list[str]:
        return [str(event.data.get("signature")) for event in self.events if event.code == "WARNING"]


def train(inputs: StageInputs, plan: StagePlan, cache_directory: Path | None = None) -> Training:
    """Trains a stage to its end under a plan that is in force. cache_directory: of a cache on disk."""
    training = Training()
    hooks = Hooks(
        on_event=training.events.append,
        save=lambda progress, tensors, due: None,
        should_stop=lambda: False,
    )
    train_stage(inputs, plan, hooks, cache_directory=cache_directory)
    return training


def random_lengths(count: int, mean: int) -> list[int]:
    """Returns lengths like BoolQ's: from 0.4 to 1.6 of the mean, the same at each call."""
    return [max(2, round(mean * (0.4 + 1.2 * ((37 * row) % 100) / 99))) for row in range(count)]
