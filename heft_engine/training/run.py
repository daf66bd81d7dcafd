"""One run, from rows to bundle: the recipe's stages in order, each on the frozen result of those before it.

A LoRA stage ends merged; a ReFT stage leaves an intervention in place that later stages train through. This module
alone holds the run's state, emits its events and writes its files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.bundle.format import Bundle
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import TrainConfig
from heft_engine.data.encoding import Example
from heft_engine.data.rows import Row
from heft_engine.errors import ConfigError
from heft_engine.evaluation.evaluate import mean_loss
from heft_engine.events import Event, OnEvent, Pulse
from heft_engine.model.base_models import resolve
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import choose_device
from heft_engine.runtime.random_state import RandomState
from heft_engine.training import run_events
from heft_engine.training.activation_store import ActivationStore, StageActivations
from heft_engine.training.cache_plan import CacheBudget
from heft_engine.training.checkpoint import (
    CheckpointWriter,
    RunState,
    StageSnapshot,
    load_checkpoint,
    rows_hash,
    write_stage,
)
from heft_engine.training.costs import stage_cost
from heft_engine.training.loop import Hooks
from heft_engine.training.memory_plan import peak
from heft_engine.training.plan import plan_stage
from heft_engine.training.progress import Progress
from heft_engine.training.result import (
    StageMeasurements,
    evaluate_stage,
    measure_epoch,
    measure_stage,
    row_results,
    validation_result,
    write_result,
)
from heft_engine.training.setup import RunInputs, load
from heft_engine.training.stage import train_stage
from heft_engine.training.stage_cache import StageCache, StageStore, activation_key, stage_keys
from heft_engine.training.stage_inputs import StageInputs, StageOptions, attach_stage


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
) -> Bundle:
    """Trains the stages of a config and writes a bundle to `out_dir`, a new or empty directory.

    `eval_rows` decide early stopping and `test_rows` are only reported. `stage_store` holds the results of stages of
    earlier runs: a new run starts after the longest prefix of its stages found there, and stores its own results.
    `activations`: frozen activations that runs on this machine share.
    Raises EngineError: RowError, ConfigError, ModelError, TrainingError, or Stopped after `should_stop` returned True
    and a checkpoint was written.
    """
    options = options or RunOptions()
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty: a bundle needs a directory of its own", param="out")
    base = resolve(
        config.model,
        model_dir=options.model_dir,
        cache_dir=options.cache_dir,
        allow_paths=options.allow_paths,
    )
    inputs = load(config, base, train_rows, eval_rows, test_rows, options.device or choose_device())
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
    config, lm = inputs.config, inputs.lm
    lm.on_forward = Pulse(on_event)
    state, output = _open(inputs, options, on_event, stage_store)
    output.emit(run_events.started(inputs))
    state, measured = _begin(inputs, state, output)
    stage_options = _stage_options(config, options, out_dir.parent)
    for index in range(state.stage_index, len(config.stages)):
        began = time.monotonic()
        stage = attach_stage(inputs, index)
        with peak(lm.device) as peak_bytes:
            progress, other_seconds = _train(stage, state, stage_options, output, activations, should_stop)
            cost = stage_cost(stage, progress, time.monotonic() - began + other_seconds)
            merge = stage.adapter.finish(inputs.merge_probes)
            if merge is not None:
                output.emit(run_events.merge_verified(config, index, merge))
            evaluation, scores = evaluate_stage(inputs, index)
            general_loss = mean_loss(lm, inputs.general)
            memory_bytes = peak_bytes()
        state = state.after_stage(progress, merge, evaluation, general_loss, cost)
        output.emit(*run_events.stage_ended(inputs, state, progress, time.monotonic() - began, memory_bytes))
        measured = measure_stage(inputs, scores)
        output.save_stage(state, measured, list(lm.interventions), key=output.cache.key(index))
        output.store_stage(state, measured)
    measured = measured or measure_stage(inputs)
    bundle = write_result(inputs, state, measured, list(lm.interventions), out_dir)
    validation = validation_result(inputs, measured, generate_text=options.evaluate_validation)
    output.emit(run_events.succeeded(state, bundle, row_results(inputs, state, validation)))
    return bundle


def _open(
    inputs: RunInputs, options: RunOptions, on_event: OnEvent, stage_store: StageStore | None
) -> tuple[RunState, _Output]:
    """Returns the state to continue, a checkpoint's or a new one, and the outputs of a run that does."""
    rows_sha256 = rows_hash(inputs.examples)
    keys = stage_keys(inputs) if stage_store is not None else []
    state = RunState(rows_sha256=rows_sha256, keys=keys)
    if options.resume is not None:
        checkpoint = load_checkpoint(options.resume, inputs.config, rows_sha256)
        state = checkpoint.state
        interventions = [stored.restore(inputs.lm.hidden_size) for stored in checkpoint.interventions]
        _apply(inputs.lm, state.adapters, interventions)
    # A checkpoint may be continued by newer code, or beside other test rows: its results belong to no key.
    cache = StageCache(store=stage_store, keys=keys if state.keys == keys else [])
    checkpoints = CheckpointWriter(
        directory=options.checkpoint_dir, seconds=options.checkpoint_seconds, epochs=options.n_checkpoints
    )
    return state, _Output(inputs=inputs, on_event=on_event, checkpoints=checkpoints, cache=cache)


def _begin(inputs: RunInputs, state: RunState, output: _Output) -> tuple[RunState, StageMeasurements | None]:
    """Returns the state before the first stage to train, and its measurements where they are known.

    A new run starts after its longest cached prefix, each stage of which is announced and saved as if it had just
    ended; without one, with the evaluation of the base.
    """
    if state.evaluations:
        return state, None
    cached_stages = output.cache.restore(inputs)
    if not cached_stages:
        general_loss = mean_loss(inputs.lm, inputs.general)
        evaluation, _ = evaluate_stage(inputs, None)
        output.emit(*run_events.evaluation(evaluation, inputs.split))
        return state.with_base(evaluation, general_loss), None
    for index, cached in enumerate(cached_stages):
        output.emit(*run_events.stage_reused(inputs, cached.state, output.cache.key(index)))
        output.save_stage(cached.state, cached.measured, cached.interventions)
    last = cached_stages[-1]
    _apply(inputs.lm, last.state.adapters, last.interventions)
    return last.state, last.measured


def _train(
    stage: StageInputs,
    state: RunState,
    options: StageOptions,
    output: _Output,
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

    with plan_stage(stage, options, earlier) as plan:
        output.emit(*run_events.stage_started(inputs.config, stage, plan))
        result = train_stage(
            stage,
            plan,
            Hooks(
                on_event=output.on_event,
                save=save,
                save_epoch=partial(output.save_epoch, state, stage),
                should_stop=should_stop,
            ),
            cache_directory=options.cache.directory,
            snapshot=snapshot,
            find_activations=find_activations,
        )
    return result.progress, earlier_seconds + result.saved_seconds


def _apply(
    lm: PackedLM, adapters: Sequence[LoraWeights], interventions: Sequence[PlacedIntervention]
) -> None:
    """Puts the model where finished stages left it: adapters merged, interventions in place."""
    for adapter in adapters:
        adapter.merge_into(lm.model)
    lm.interventions.extend(interventions)


def _stage_options(config: TrainConfig, options: RunOptions, cache_directory: Path) -> StageOptions:
    cache = CacheBudget(
        memory=options.cache_memory_bytes,
        disk=options.cache_disk_bytes,
        directory=cache_directory,
        sharers=options.sharers,
    )
    return StageOptions(
        cache=cache,
        compile=config.compile,
        memory_bytes=options.memory_bytes,
        cache_dir=options.cache_dir,
    )


@dataclass(frozen=True, kw_only=True)
class _Output:
    """Everything that leaves a run before its bundle: events, checkpoints, results of stages for later runs."""

    inputs: RunInputs
    on_event: OnEvent
    checkpoints: CheckpointWriter
    cache: StageCache

    def emit(self, *events: Event) -> None:
        for event in events:
            self.on_event(event)

    def save_step(self, state: RunState, stage: StageInputs, snapshot: StageSnapshot) -> None:
        """Writes a checkpoint inside a stage."""
        config, progress = self.inputs.config, snapshot.progress
        path = self.checkpoints.save_step(state, config, stage, snapshot)
        step = stage.first_step + progress.step
        self.emit(run_events.checkpoint_saved(config, stage.index, step, "step", path, progress.losses))

    def save_epoch(self, state: RunState, stage: StageInputs, progress: Progress) -> None:
        """Writes the model at the end of an epoch, which can be served. state: before the stage."""
        inputs, index = self.inputs, stage.index
        later_stages = sum(later.n_epochs - 1 for later in inputs.config.stages[index + 1 :])
        if not self.checkpoints.is_epoch_due(stage.stage.n_epochs - 1 - progress.epoch + later_stages):
            return
        random_state = RandomState.current()
        weights = stage.adapter.weights()
        adapters = state.adapters if weights is None else [*state.adapters, weights]
        inside = replace(state, stage_index=index + 1, adapters=adapters)
        measured = measure_epoch(inputs, weights)
        write = partial(write_result, inputs, inside, measured, list(inputs.lm.interventions))
        step = stage.first_step + progress.step
        path = self.checkpoints.save_epoch(step, write)
        random_state.restore()  # a run with checkpoints of epochs is the same as one without
        self.emit(run_events.checkpoint_saved(inputs.config, index, step, "epoch", path, progress.losses))

    def save_stage(
        self,
        state: RunState,
        measured: StageMeasurements,
        interventions: Sequence[PlacedIntervention],
        key: str | None = None,
    ) -> None:
        """Writes a checkpoint at the end of a stage, which is a model too. key: that later runs find it by."""
        if self.checkpoints.directory is None:
            return
        config, index = self.inputs.config, state.stage_index - 1
        step = self.inputs.first_step(state.stage_index)
        write = partial(write_result, self.inputs, state, measured, interventions)
        path = self.checkpoints.save_stage(state, config, step, write)
        self.emit(run_events.checkpoint_saved(config, index, step, "stage", path, state.losses, key))

    def store_stage(self, state: RunState, measured: StageMeasurements) -> None:
        """Stores the result of a stage for later runs. A store that can't take it does not fail the run."""
        config, index = self.inputs.config, state.stage_index - 1
        interventions = list(self.inputs.lm.interventions)
        write = partial(write_result, self.inputs, state, measured, interventions)
        try:
            self.cache.put(index, partial(write_stage, state=state, config=config, write_bundle=write))
        except (OSError, SafetensorError) as error:
            self.emit(run_events.stage_not_stored(config, index, error))
