"""The training of one stage: its forward passes, and the loop, from a checkpoint's snapshot if there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.objectives.registry import create
from heft_engine.runtime.random_state import RandomState
from heft_engine.training.activation_store import StageActivations
from heft_engine.training.checkpoint import StageSnapshot
from heft_engine.training.data_parallel.division import SharedPass
from heft_engine.training.forward_pass import SuffixPass
from heft_engine.training.loop import Hooks, TrainLoop
from heft_engine.training.memory.cache_plan import CachePlan
from heft_engine.training.plan import StagePlan
from heft_engine.training.progress import Progress
from heft_engine.training.stage_inputs import StageInputs

#: Returns the saved activations of some rows, to be read or written; None: they are not shared between runs.
FindActivations = Callable[[Sequence[Example]], StageActivations | None]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A stage trained to its end.

    saved_seconds: of prefills, computed by earlier runs and found saved; negative: spent on saving this run's.
    """

    progress: Progress
    saved_seconds: float


def train_stage(
    inputs: StageInputs,
    plan: StagePlan,
    hooks: Hooks,
    *,
    cache_directory: Path | None = None,
    snapshot: StageSnapshot | None = None,
    find_activations: FindActivations = lambda examples: None,
) -> StageResult:
    """Trains to the end under a plan that is in force. `cache_directory`: of caches on disk.

    Raises Stopped after a checkpoint, TrainingError when training can't succeed.
    """
    # New modules start in training mode, in which an intervention above the first would drop out of the prefill.
    inputs.adapter.train(False)

    training = _open_pass(
        inputs, plan.cache, inputs.examples, _cache_file(cache_directory, "training"), find_activations
    )
    validation = _open_pass(
        inputs,
        plan.validation_cache,
        inputs.validation,
        _cache_file(cache_directory, "validation"),
        find_activations,
    )
    loop = TrainLoop(
        stage=inputs.stage,
        index=inputs.index,
        seed=inputs.seed,
        adapter=inputs.adapter,
        objective=create(inputs.stage.objective),
        forward=training,
        validation=validation,
        early_stopping=inputs.early_stopping,
        stages_before=inputs.stages_before,
        first_step=inputs.first_step,
        total_steps=inputs.total_steps,
        hooks=hooks,
        ranks=inputs.ranks,
        progress=plan.as_progress,
    )
    if snapshot is not None:
        loop.restore(snapshot.progress, snapshot.tensors)
        RandomState.from_tensors(snapshot.tensors).restore()  # last, since everything above may draw
        snapshot.tensors.clear()  # with Adam's moments they are larger than the adapter
    loop.run()
    passes = [shared.forward for shared in (training, validation)]
    caches = [forward.cache for forward in passes if isinstance(forward, SuffixPass)]
    return StageResult(progress=loop.progress, saved_seconds=sum(cache.saved_seconds for cache in caches))


def _open_pass(
    inputs: StageInputs,
    cache: CachePlan,
    examples: Sequence[Example],
    file: Path | None,
    find_activations: FindActivations,
) -> SharedPass:
    """Returns the pass of these examples, with the activations of the rows that this rank holds."""
    division = inputs.division(examples, fixed=cache.level != CacheLevel.NONE)
    rows = division.held(inputs.ranks.rank)
    rank_examples = [examples[row] for row in rows]
    activations = find_activations(rank_examples) if _shareable(inputs, cache) else None
    return SharedPass(
        forward=cache.open(inputs.lm, inputs.adapter.boundary(), rank_examples, file, activations),
        examples=examples,
        division=division,
        rank=inputs.ranks.rank,
        places={row: place for place, row in enumerate(rows)},
    )


def _shareable(inputs: StageInputs, cache: CachePlan) -> bool:
    """Returns True if the prefill is the same in other runs: no intervention that this stage goes on training acts."""
    trained = inputs.adapter.boundary().interventions
    return cache.level == CacheLevel.KV and not any(placed in inputs.standing for placed in trained)


def _cache_file(directory: Path | None, name: str) -> Path | None:
    if directory is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    # Two runs may share the folder.
    return directory / f"{name}-{uuid4().hex}.cache"
