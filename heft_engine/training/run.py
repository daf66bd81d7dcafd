"""One run, from rows to bundle: the recipe's stages in order, each on the frozen result of those before it.

A LoRA stage ends merged; a ReFT stage leaves an intervention in place that later stages train through. This module
alone holds the run's state, emits its events and writes its files.

Of several ranks all train and merge; rank 0 alone finds checkpoints, plans, evaluates, emits events and writes. The
others wait for what it sends: the checkpoint or cached stage to begin with, each stage's plan, the state after each
stage, and the bundle. States and plans travel as JSON, all else as files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from heft_engine.adapters.adapter import Merge
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.bundle.assemble import resolve_base
from heft_engine.bundle.format import Bundle, read_bundle
from heft_engine.bundle.start import read_start
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import TrainConfig
from heft_engine.data.encoding import Example
from heft_engine.data.rows import Row
from heft_engine.errors import ConfigError
from heft_engine.evaluation.evaluate import mean_loss
from heft_engine.events import Event, OnEvent, Pulse
from heft_engine.model.base_models import resolve
from heft_engine.runtime.devices import choose_device
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks
from heft_engine.training import run_events
from heft_engine.training.activation_store import ActivationStore, StageActivations
from heft_engine.training.checkpoint import (
    RunState,
    StageSnapshot,
)
from heft_engine.training.costs import stage_cost
from heft_engine.training.loop import Hooks
from heft_engine.training.memory.memory_plan import peak
from heft_engine.training.plan import StagePlan, plan_stage
from heft_engine.training.progress import Progress
from heft_engine.training.result import (
    StageMeasurements,
    evaluate_stage,
    measure_stage,
    row_results,
    valid_accuracy,
    validation_result,
    write_result,
)
from heft_engine.training.run_output import RunOutput
from heft_engine.training.run_start import begin, open_run, with_results
from heft_engine.training.setup import RunInputs, load
from heft_engine.training.stage import train_stage
from heft_engine.training.stage_cache import (
    StageStore,
    activation_key,
)
from heft_engine.training.stage_inputs import StageInputs, StageOptions, attach_stage, make_stage_options

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    out_dir: Path,
    on_event: OnEvent,
    *,
    test_rows: Sequence[Row] = (),
    options: RunOptions | None = None,
    stage_store: StageStore | None = None,
    activations: ActivationStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Bundle:
    """Trains the stages of a config and writes a bundle to `out_dir`, a new or empty directory.

    They start from the config's model: a base, or a fine-tuned model (`options.start`, or a bundle's path). The new
    bundle holds that one's stages too.

    `eval_rows` decide early stopping and `test_rows` are only reported. `stage_store` holds the results of stages of
    earlier runs: a new run starts after the longest prefix of its stages found there, and stores its own results.
    `activations`: frozen activations that runs on this machine share. `ranks`: the processes that train together; each
    calls this with the same arguments, and all return the bundle that rank 0 has written.
    Raises EngineError: RowError, ConfigError, ModelError, TrainingError, or Stopped after `should_stop` returned True
    and a checkpoint was written.
    """
    options = options or RunOptions()
    start = read_start(config.model, options.start, allow_paths=options.allow_paths)
    if ranks.is_first and out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty: a bundle needs a directory of its own", param="out")
    folders: dict[str, Any] = options.model_dump(include={"model_dir", "cache_dir", "allow_paths"})
    if start is None:
        base = resolve(config.model, **folders)
    else:
        config, base = start.inherit(config), resolve_base(start.bundle, **folders)
    ranks = ranks.on_device(options.device)
    device = ranks.device or choose_device()
    inputs = load(config, base, train_rows, eval_rows, test_rows, device, ranks, start)
    return run_stages(
        inputs,
        out_dir,
        on_event,
        options,
        stage_store=stage_store,
        activations=activations,
        should_stop=should_stop,
    )


def run_stages(
    inputs: RunInputs,
    out_dir: Path,
    on_event: OnEvent,
    options: RunOptions,
    *,
    stage_store: StageStore | None = None,
    activations: ActivationStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Bundle:
    """Trains the stages of loaded inputs and writes the bundle. Parameters and errors are those of `train`."""
    ranks = inputs.ranks
    if not ranks.is_first:
        on_event, stage_store = _log_warning, None
        options = options.model_copy(update={"checkpoint_dir": None})
    inputs.lm.on_forward = Pulse(on_event)
    state, output = open_run(inputs, options, on_event, stage_store)
    output.emit(run_events.started(inputs))
    state, measured = begin(inputs, state, output)
    stage_options = make_stage_options(inputs, options, out_dir.parent)
    for index in range(state.stage_index, len(inputs.config.stages)):
        began = time.monotonic()
        stage = attach_stage(inputs, index)
        with peak(inputs.lm.device) as peak_bytes:
            progress, other_seconds = _train(stage, state, stage_options, output, activations, should_stop)
            trained = _TrainedStage(
                stage=stage,
                progress=progress,
                cost=stage_cost(stage, progress, time.monotonic() - began + other_seconds),
                merge=stage.adapter.finish(inputs.merge_probes),
                began=began,
                peak_bytes=peak_bytes,
            )
            state, measured = _finish_stage(trained, state, output)
    if not ranks.is_first:
        with ranks.shared_directory(None) as copy:
            assert copy is not None, "rank 0 writes a bundle"
            return replace(read_bundle(copy), path=out_dir)
    stage_results = measured or measure_stage(inputs)
    bundle = write_result(inputs, state, stage_results, list(inputs.lm.interventions), out_dir)
    validation = validation_result(inputs, stage_results, generate_text=options.evaluate_validation)
    output.emit(run_events.succeeded(state, bundle, row_results(inputs, state, validation)))
    with ranks.shared_directory(out_dir):
        return bundle


def _train(
    stage: StageInputs,
    state: RunState,
    options: StageOptions,
    output: RunOutput,
    activations: ActivationStore | None,
    should_stop: Callable[[], bool],
) -> tuple[Progress, float]:
    """Trains an attached stage, from the state's snapshot if it has one, with checkpoints on the way.

    Returns the progress at its end, and the seconds that its training took before and elsewhere: in earlier attempts,
    and to compute activations that another run has saved; less those that this run spent on saving them.
    """
    inputs, snapshot = output.inputs, state.snapshot
    earlier = snapshot.progress if snapshot is not None else None
    earlier_seconds = earlier.seconds if earlier is not None else 0.0

    def save(progress: Progress, tensors: Callable[[], dict[str, Tensor]], due: bool) -> None:
        if output.checkpoints.is_due(due):
            output.save_step(state, stage, StageSnapshot(progress=progress, tensors=tensors()))

    def find_activations(examples: Sequence[Example]) -> StageActivations | None:
        if activations is None:
            return None
        return activations.for_key(activation_key(inputs, state.adapters, stage, examples, activations.owner))

    with _shared_plan(stage, options, earlier) as plan:
        output.emit(*run_events.stage_started(inputs.config, stage, plan))
        result = train_stage(
            stage,
            plan,
            Hooks(
                on_event=output.on_event,
                save=save,
                save_epoch=partial(output.save_epoch, state, stage),
                valid_accuracy=partial(valid_accuracy, inputs),
                should_stop=should_stop,
            ),
            cache_directory=options.cache.directory,
            snapshot=snapshot,
            find_activations=find_activations,
        )
    return result.progress, earlier_seconds + result.saved_seconds


@contextmanager
def _shared_plan(stage: StageInputs, options: StageOptions, earlier: Progress | None) -> Iterator[StagePlan]:
    """Yields the plan of a stage: rank 0's, by its own free memory, which the other ranks follow."""
    ranks = stage.ranks
    if not ranks.is_first:
        earlier = Progress.of(ranks.receive())
    with plan_stage(stage, options, earlier) as plan:
        if ranks.is_first:
            ranks.send(asdict(plan.as_progress))
        yield plan


@dataclass(frozen=True, kw_only=True)
class _TrainedStage:
    """A stage that has been trained and merged, but not measured. began: on the monotonic clock."""

    stage: StageInputs
    progress: Progress
    cost: dict[str, Any]
    merge: Merge[LoraWeights] | None
    began: float
    peak_bytes: Callable[[], int | None]


def _finish_stage(
    trained: _TrainedStage, state: RunState, output: RunOutput
) -> tuple[RunState, StageMeasurements | None]:
    """Returns the state after a trained stage, and to rank 0 its measurements."""
    ranks = output.inputs.ranks
    if ranks.is_first:
        state, measured = _measure_stage(trained, state, output)
        ranks.send(state.to_json())
        return state, measured
    merges = [trained.merge.weights] if trained.merge is not None else []
    return with_results(state, ranks.receive(), [*state.adapters, *merges]), None


def _measure_stage(
    trained: _TrainedStage, state: RunState, output: RunOutput
) -> tuple[RunState, StageMeasurements]:
    """Measures a trained stage, emits its events and writes its checkpoint. Returns the state after it."""
    inputs, index = output.inputs, trained.stage.index
    if trained.merge is not None:
        output.emit(run_events.merge_verified(inputs.config, index, trained.merge))
    evaluation, scores = evaluate_stage(inputs, index)
    general_loss = mean_loss(inputs.lm, inputs.general)
    memory_bytes = trained.peak_bytes()
    state = state.after_stage(trained.progress, trained.merge, evaluation, general_loss, trained.cost)
    seconds = time.monotonic() - trained.began
    output.emit(*run_events.stage_ended(inputs, state, trained.progress, seconds, memory_bytes))
    measured = measure_stage(inputs, scores)
    if measured.valid_accuracy is not None:
        state = replace(state, losses={**state.losses, "valid_accuracy": measured.valid_accuracy})
    output.save_stage(state, measured, list(inputs.lm.interventions), key=output.cache.key(index))
    output.store_stage(state, measured)
    return state, measured


def _log_warning(event: Event) -> None:
    """Logs warnings of a rank whose other events nobody needs: rank 0 emits the same ones."""
    if event.level != "info":
        log.warning("%s", event.message)
