"""Everything that leaves a run before its bundle: events, checkpoints, results of stages for later runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from safetensors import SafetensorError

from heft_engine.events import Event, OnEvent
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.runtime.random_state import RandomState
from heft_engine.training import run_events
from heft_engine.training.checkpoint import CheckpointWriter, RunState, StageSnapshot, write_stage
from heft_engine.training.progress import Progress
from heft_engine.training.result import StageMeasurements, measure_epoch, valid_accuracy, write_result
from heft_engine.training.setup import RunInputs
from heft_engine.training.stage_cache import StageCache
from heft_engine.training.stage_inputs import StageInputs


@dataclass(frozen=True, kw_only=True)
class RunOutput:
    """The outputs of a run of these inputs. Of several ranks, those of rank 0 alone leave the process."""

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
        losses = progress.losses
        if "valid_accuracy" not in losses and (accuracy := valid_accuracy(inputs)) is not None:
            losses["valid_accuracy"] = accuracy
        random_state.restore()  # a run with checkpoints of epochs is the same as one without
        self.emit(run_events.checkpoint_saved(inputs.config, index, step, "epoch", path, losses))

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
