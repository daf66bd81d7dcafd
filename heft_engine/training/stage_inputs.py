"""One stage's share of a run's inputs, its fresh adapter attached to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heft_engine.adapters.adapter import Adapter
from heft_engine.adapters.registry import attach
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import Auto, EarlyStopping, Stage
from heft_engine.data.encoding import Example
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import packed_length
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks
from heft_engine.training.data_parallel.division import Division
from heft_engine.training.memory.cache_plan import CacheBudget
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
    stages_before: int = 0  #: stages of the model that the run goes on from
    first_step: int = 0  #: optimizer steps of the run before this stage
    total_steps: int  #: of the whole run
    ranks: Ranks = SINGLE_PROCESS

    @property
    def place(self) -> int:
        """The stage's number in its model, on which its random draws depend."""
        return self.stages_before + self.index

    def division(self, examples: Sequence[Example], *, fixed: bool) -> Division:
        """Returns the division of this stage's examples among its ranks."""
        return Division([packed_length(example) for example in examples], self.ranks.size, fixed)

    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.adapter.parameters().values())


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """A stage's use of its machine. cache_dir: for compiled layers.

    memory_bytes: what the stage may take beyond what the process has; None: its share of what is free. sharers: runs
    that share a GPU's memory; the machine's own is shared by `cache.sharers` processes.
    """

    cache: CacheBudget
    compile: bool | Auto
    memory_bytes: int | None = None
    sharers: int = 1
    cache_dir: Path | None = None


def attach_stage(inputs: RunInputs, index: int) -> StageInputs:
    """Attaches the adapter of stage `index`. The same seed gives the same bits, whatever ran before.

    A run that goes on from another's model trains what one run of all the stages would.
    """
    torch.manual_seed(derived_seed(inputs.config.seed, inputs.stages_before + index))
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
        stages_before=inputs.stages_before,
        first_step=inputs.first_step(index),
        total_steps=inputs.total_steps,
        ranks=inputs.ranks,
    )


def make_stage_options(inputs: RunInputs, options: RunOptions, cache_directory: Path) -> StageOptions:
    """The ranks of one machine divide its memory and its disk among them; each has a GPU to itself."""
    processes = inputs.ranks.local_size
    cache = CacheBudget(
        memory=_divided(options.cache_memory_bytes, processes),
        disk=options.cache_disk_bytes // processes,
        directory=cache_directory,
        sharers=options.sharers * processes,
    )
    device_sharers = processes if inputs.lm.device.type == "cpu" else 1
    return StageOptions(
        cache=cache,
        compile=inputs.config.compile,
        memory_bytes=_divided(options.memory_bytes, device_sharers),
        sharers=options.sharers,
        cache_dir=options.cache_dir,
    )


def _divided(budget: int | None, parts: int) -> int | None:
    return None if budget is None else budget // parts
