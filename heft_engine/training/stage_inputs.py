"""One stage's share of a run's inputs, its fresh adapter attached to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heft_engine.adapters.adapter import Adapter
from heft_engine.adapters.registry import attach
from heft_engine.config.train import Auto, EarlyStopping, Stage
from heft_engine.data.encoding import Example
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.cache_plan import CacheBudget
from heft_engine.training.schedule import derived_seed
from heft_engine.training.setup import RunInputs


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """One stage's model, adapter and rows. `examples` and `validation` hold their right answers alone."""

    lm: PackedLM
    stage: Stage
    index: int
    seed: int  #: the run's
    adapter: Adapter
    standing: tuple[PlacedIntervention, ...]  #: interventions of earlier stages, in the order of acting
    examples: Sequence[Example]
    validation: Sequence[Example]
    early_stopping: EarlyStopping | None = None
    first_step: int = 0  #: optimizer steps of the run before this stage
    total_steps: int  #: of the whole run

    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.adapter.parameters().values())


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """A stage's use of its machine. cache_dir: for compiled layers.

    memory_bytes: what the stage may take beyond what the process has; None: its share of what is free.
    """

    cache: CacheBudget
    compile: bool | Auto
    memory_bytes: int | None = None
    cache_dir: Path | None = None


def attach_stage(inputs: RunInputs, index: int) -> StageInputs:
    """Attaches the adapter of stage `index`. The same seed gives the same bits, whatever ran before."""
    torch.manual_seed(derived_seed(inputs.config.seed, index))
    standing = tuple(inputs.lm.interventions)
    stage = inputs.config.stages[index]
    return StageInputs(
        lm=inputs.lm,
        stage=stage,
        index=index,
        seed=inputs.config.seed,
        adapter=attach(inputs.lm, stage),
        standing=standing,
        examples=inputs.examples,
        validation=inputs.validation,
        early_stopping=inputs.config.early_stopping,
        first_step=inputs.first_step(index),
        total_steps=inputs.total_steps,
    )
