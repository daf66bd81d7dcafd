"""One stage of a run in training: its planner, the loop, its checkpoints.

It does NOT know what becomes of a stage that has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from torch import Tensor

from heft_engine.adapters.adapter import Adapter
from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.objectives.registry import create
from heft_engine.training.cache_plan import CacheBudget, CachePlan
from heft_engine.training.checkpoint import CheckpointWriter
from heft_engine.training.forward_pass import ForwardPass, SuffixPass
from heft_engine.training.loop import Hooks, Progress, TrainLoop
from heft_engine.training.plan import Planner, StagePlan

if TYPE_CHECKING:
    from heft_engine.training.run import Run


def planner_of(run: Run, index: int, trainable: Adapter) -> Planner:
    return Planner(
        lm=run.lm,
        stage=run.config.stages[index],
        index=index,
        seed=run.config.seed,
        trainable=trainable,
        boundary=trainable.boundary(),
        examples=run.examples,
        validation=run.validation,
        budget=run.cache,
        compile=run.config.compile,
        cache_dir=run.cache_dir,
        room=run.memory_bytes,
    )


def train_stage(
    run: Run,
    index: int,
    trainable: Adapter,
    plan: StagePlan,
    interventions_before: int,
    writer: CheckpointWriter,
    should_stop: Callable[[], bool],
) -> tuple[Progress, float]:
    """Trains to the end, from the run's checkpoint if that lies inside the stage.

    Also gives the seconds that earlier runs had spent on prefills found here: they count among what the stage costs.
    Below 0 are those that this one spent on leaving its own to others.
    """
    stage, boundary = run.config.stages[index], trainable.boundary()
    standing = list(run.lm.interventions)[:interventions_before]

    def save(progress: Progress, tensors: Callable[[], dict[str, Tensor]], due: bool) -> None:
        run_step = run.first_steps[index] + progress.step
        if writer.is_due(due):
            state = run.state.inside(asdict(progress), interventions_before)
            writer.step(state, run_step, run.config, tensors(), run.adapters, standing, stage.type)

    def source(cache: CachePlan, examples: Sequence[Example], name: str) -> ForwardPass:
        # Interventions of earlier stages that go on in this one act in nobody else's prefill.
        fresh = not any(placed in standing for placed in boundary.interventions)
        prefills = None
        if run.reuse is not None and fresh and cache.level == CacheLevel.KV:
            prefills = run.reuse.prefills(standing, boundary, examples)
        return cache.open(run.lm, boundary, examples, _cache_file(run.cache, name), prefills)

    # Fresh modules begin in training mode, where an intervention above the first would drop out of the prefill.
    trainable.train(False)
    training = source(plan.cache, run.examples, "training")
    validation = source(plan.validation_cache, run.validation, "validation")

    loop = TrainLoop(
        stage=stage,
        index=index,
        seed=run.config.seed,
        adapter=trainable,
        objective=create(stage.objective),
        forward=training,
        validation=validation,
        early_stopping=run.config.early_stopping,
        first_step=run.first_steps[index],
        total_steps=run.total_steps,
        hooks=Hooks(on_event=run.on_event, save=save, should_stop=should_stop),
    )
    loop.progress = replace(
        loop.progress,
        cache=plan.cache.to_json(),
        validation_cache=plan.validation_cache.to_json(),
        **plan.of_progress,
    )
    if run.state.inside_stage is not None:
        run.state.restore_stage(loop)
    loop.run()
    caches = [one.cache for one in (training, validation) if isinstance(one, SuffixPass)]
    return loop.progress, sum(cache.saved_seconds for cache in caches)


def _cache_file(cache: CacheBudget, name: str) -> Path | None:
    if cache.directory is None:
        return None
    cache.directory.mkdir(parents=True, exist_ok=True)
    # Two runs may share the folder.
    return cache.directory / f"{name}-{uuid4().hex}.cache"
