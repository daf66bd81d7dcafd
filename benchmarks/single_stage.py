"""One stage on examples at hand, planned and trained as a run does it, without a run's evaluation, files and merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heft_engine.adapters.registry import attach
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import Auto, Stage
from heft_engine.data.encoding import Example
from heft_engine.events import OnEvent
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.registry import create
from heft_engine.training.activation_cache import size_of
from heft_engine.training.forward_pass import ForwardPass, FullPass
from heft_engine.training.loop import Hooks, TrainLoop
from heft_engine.training.memory.cache_plan import CacheBudget, CachePlan
from heft_engine.training.plan import StagePlan, plan_stage
from heft_engine.training.stage_inputs import StageInputs, StageOptions


@dataclass(frozen=True, kw_only=True)
class SingleStage:
    """A stage whose plan is in force."""

    inputs: StageInputs
    options: StageOptions
    plan: StagePlan
    on_event: OnEvent

    def forward(self) -> ForwardPass:
        """Returns the forward pass of the rows. Fills its cache."""
        inputs = self.inputs
        return self.plan.cache.open(inputs.lm, inputs.adapter.boundary(), inputs.examples, None)

    def train(self, forward: ForwardPass, **progress: Any) -> None:
        """`progress`: fields of Progress that differ from the plan's."""
        inputs = self.inputs
        TrainLoop(
            stage=inputs.stage,
            index=inputs.index,
            seed=inputs.seed,
            adapter=inputs.adapter,
            objective=create(inputs.stage.objective),
            forward=forward,
            validation=FullPass(lm=inputs.lm, examples=[]),
            early_stopping=None,
            first_step=0,
            total_steps=inputs.total_steps,
            progress=replace(self.plan.as_progress, **progress),
            hooks=Hooks(on_event=self.on_event, save=lambda *_: None, should_stop=lambda: False),
        ).run()


@contextmanager
def single_stage(
    lm: PackedLM,
    stage: Stage,
    rows: Sequence[Example],
    on_event: OnEvent,
    *,
    level: CacheLevel = CacheLevel.NONE,
    compile: bool | Auto = False,
    cache_dir: Path | None = None,
) -> Iterator[SingleStage]:
    """Attaches the stage's adapter, the same bits each time, and leaves it attached.

    `level`: of the cache, in memory; there is none for a stage that trains the first layer.
    """
    torch.manual_seed(0)
    adapter = attach(lm, stage)
    boundary = adapter.boundary()
    level = level if boundary.layer else CacheLevel.NONE
    inputs = StageInputs(
        lm=lm,
        stage=stage,
        index=0,
        seed=0,
        adapter=adapter,
        standing=(),
        examples=rows,
        validation=[],
        total_steps=stage.n_epochs * -(-len(rows) // stage.batch_size),
    )
    cache = CachePlan(level=level, bytes=size_of(lm, boundary, rows, level))
    options = StageOptions(cache=CacheBudget(), compile=compile, cache_dir=cache_dir)
    with plan_stage(inputs, options, caches=(cache, CachePlan(level=CacheLevel.NONE))) as plan:
        yield SingleStage(inputs=inputs, options=options, plan=plan, on_event=on_event)
