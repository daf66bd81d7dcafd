"""The beginning of a run: its state, a checkpoint's or a cached stage's or a new one, and the model in that state.

Rank 0 alone finds checkpoints and cached stages; the others get a copy of their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.bundle.assemble import restore_interventions
from heft_engine.config.run_file import RunOptions
from heft_engine.evaluation.evaluate import mean_loss
from heft_engine.events import OnEvent
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.distributed import Ranks
from heft_engine.training import run_events
from heft_engine.training.checkpoint import Checkpoint, CheckpointWriter, RunState, load_checkpoint, rows_hash
from heft_engine.training.result import StageMeasurements, evaluate_stage
from heft_engine.training.run_output import RunOutput
from heft_engine.training.setup import RunInputs
from heft_engine.training.stage_cache import CachedStage, StageCache, StageStore, read_stage, stage_keys


def open_run(
    inputs: RunInputs, options: RunOptions, on_event: OnEvent, stage_store: StageStore | None
) -> tuple[RunState, RunOutput]:
    """Returns the state to continue, a checkpoint's or a new one, and the outputs of a run that does."""
    ranks, rows_sha256 = inputs.ranks, rows_hash(inputs.examples)
    ranks.check_same("the training rows", rows_sha256)
    keys = stage_keys(inputs) if stage_store is not None else []
    start_sha256 = inputs.start.sha256 if inputs.start is not None else None
    ranks.check_same("the fine-tuned models to go on from", start_sha256 or "")
    state = RunState(rows_sha256=rows_sha256, start_sha256=start_sha256, keys=keys, processes=ranks.size)
    load = partial(load_checkpoint, config=inputs.config, rows_sha256=rows_sha256, start_sha256=start_sha256)
    checkpoint = _load_shared(ranks, options.resume, load)
    if checkpoint is not None:
        state = _continued(checkpoint.state, ranks)
        interventions = [stored.restore(inputs.lm.hidden_size) for stored in checkpoint.interventions]
        _apply(inputs.lm, state.adapters, interventions)
    # A checkpoint may be continued by newer code, or beside other test rows: its results belong to no key.
    cache = StageCache(store=stage_store, keys=keys if state.keys == keys else [])
    checkpoints = CheckpointWriter(
        directory=options.checkpoint_dir, seconds=options.checkpoint_seconds, epochs=options.n_checkpoints
    )
    return state, RunOutput(inputs=inputs, on_event=on_event, checkpoints=checkpoints, cache=cache)


def _load_shared(ranks: Ranks, path: Path | None, load: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """Returns the checkpoint to continue from, None without one. `path` counts on rank 0: other machines lack it."""
    checkpoint = load(path) if ranks.is_first and path is not None else None
    with ranks.shared_directory(path) as copy:
        return checkpoint if ranks.is_first or copy is None else load(copy)


def _continued(state: RunState, ranks: Ranks) -> RunState:
    """Returns a checkpoint's state for these ranks. Sets torch's threads as they were, unless ranks are more or fewer.

    The order of sums in a matrix product may depend on the number of threads.
    """
    if state.processes == ranks.size:
        torch.set_num_threads(state.threads)
        return state
    return replace(state, processes=ranks.size, threads=torch.get_num_threads())


def begin(inputs: RunInputs, state: RunState, output: RunOutput) -> tuple[RunState, StageMeasurements | None]:
    """Returns the state before the first stage to train, and its measurements where they are known.

    A new run starts after its longest cached prefix, each stage of which is announced and saved as if it had just
    ended; without one, with the evaluation of the base, or of the fine-tuned model that it goes on from.
    """
    if state.evaluations:
        return state, None
    cached = _restore_cached(inputs, output)
    if cached is not None:
        _apply(inputs.lm, cached.state.adapters, cached.interventions)
        return cached.state, cached.measured
    if inputs.start is not None:
        bundle = inputs.start.bundle
        state = replace(state, adapters=bundle.adapters)
        _apply(inputs.lm, bundle.adapters, restore_interventions(bundle.interventions, inputs.lm))

    ranks = inputs.ranks
    if not ranks.is_first:
        return with_results(state, ranks.receive(), state.adapters), None
    general_loss = mean_loss(inputs.lm, inputs.general)
    evaluation, _ = evaluate_stage(inputs, None)
    output.emit(*run_events.evaluation(evaluation, inputs.split))
    state = state.with_base(evaluation, general_loss)
    ranks.send(state.to_json())
    return state, None


def with_results(state: RunState, values: Mapping[str, Any], adapters: list[LoraWeights]) -> RunState:
    """Returns the state with rank 0's results, and this rank's adapters, which are the same."""
    return RunState.from_json({**values, "keys": state.keys, "threads": state.threads}, adapters, {})


def _restore_cached(inputs: RunInputs, output: RunOutput) -> CachedStage | None:
    """Returns the last of the longest cached prefix of the run's stages. Rank 0 announces and saves them all."""
    cached_stages = output.cache.restore(inputs) if inputs.ranks.is_first else []
    for index, cached in enumerate(cached_stages):
        output.emit(*run_events.stage_reused(inputs, cached.state, output.cache.key(index)))
        output.save_stage(cached.state, cached.measured, cached.interventions)
    last = cached_stages[-1] if cached_stages else None
    with inputs.ranks.shared_directory(last.path if last is not None else None) as copy:
        return last if inputs.ranks.is_first or copy is None else read_stage(copy, inputs)


def _apply(
    lm: PackedLM, adapters: Sequence[LoraWeights], interventions: Sequence[PlacedIntervention]
) -> None:
    """Puts the model where finished stages left it: adapters merged, interventions in place."""
    for adapter in adapters:
        adapter.merge_into(lm.model)
    for placed in interventions:
        placed.intervention.to(lm.device)  # a stage may go on training it
    lm.interventions.extend(interventions)
