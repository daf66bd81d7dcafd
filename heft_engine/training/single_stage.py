"""One stage on examples at hand, planned and trained as a run does it, without a run's evaluation, files and merge: for
who measures it or compares ways to train it. It does NOT know rows, recipes or bundles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heft_engine.adapters.adapter import Adapter
from heft_engine.adapters.registry import attach
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import Auto, Stage
from heft_engine.data.encoding import Example
from heft_engine.events import OnEvent
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.registry import create
from heft_engine.training.activation_cache import size_of
from heft_engine.training.cache_plan import CacheBudget, CachePlan
from heft_engine.training.forward_pass import ForwardPass, FullPass
from heft_engine.training.loop import Hooks, Progress, TrainLoop
from heft_engine.training.plan import Planner, StagePlan


@dataclass(frozen=True, kw_only=True)
class SingleStage:
    """A stage whose plan is in force."""

    planner: Planner
    plan: StagePlan
    trainable: Adapter
    on_event: OnEvent

    def forward(self) -> ForwardPass:
        """Returns the forward pass of the rows. Fills its cache."""
        planner = self.planner
        return self.plan.cache.open(planner.lm, planner.boundary, planner.examples, None)

    def train(self, forward: ForwardPass, **progress: Any) -> None:
        """`progress`: what begins otherwise than planned, by the names of `training.Progress`."""
        stage, rows = self.planner.stage, self.planner.examples
        TrainLoop(
            stage=stage,
            index=0,
            seed=0,
            adapter=self.trainable,
            objective=create(stage.objective),
            forward=forward,
            validation=FullPass(lm=self.planner.lm, examples=[]),
            early_stopping=None,
            first_step=0,
            total_steps=stage.n_epochs * -(-len(rows) // stage.batch_size),
            progress=replace(Progress(**self.plan.of_progress), **progress),
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
    """Attaches what the stage trains, the same bits each time, and leaves it attached.

    `rung`: of the cache, in memory; there is none for a stage that trains the first layer.
    """
    torch.manual_seed(0)
    trainable = attach(lm, stage)
    boundary = trainable.boundary()
    level = level if boundary.layer else CacheLevel.NONE
    cache = CachePlan(level=level, on_disk=False, bytes=size_of(lm, boundary, rows, level))
    planner = Planner(
        lm=lm,
        stage=stage,
        index=0,
        seed=0,
        trainable=trainable,
        boundary=boundary,
        examples=rows,
        validation=[],
        budget=CacheBudget(),
        compile=compile,
        cache_dir=cache_dir,
        caches=(cache, CachePlan(level=CacheLevel.NONE, on_disk=False, bytes=0)),
    )
    with planner.planned(None) as plan:
        yield SingleStage(planner=planner, plan=plan, trainable=trainable, on_event=on_event)
