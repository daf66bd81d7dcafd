"""Builders of a run's events (heft_engine.events)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heft_engine.adapters.adapter import Merge
from heft_engine.bundle.format import Bundle
from heft_engine.config.train import TrainConfig
from heft_engine.events import (
    CheckpointSavedData,
    Event,
    StageCompleteData,
    StageReusedData,
    StageStartedData,
    StartedData,
    SucceededData,
    WarningData,
)
from heft_engine.runtime.devices import dtype_name
from heft_engine.training import failure_signatures
from heft_engine.training.checkpoint import RunState
from heft_engine.training.plan import StagePlan
from heft_engine.training.progress import Progress
from heft_engine.training.setup import RunInputs
from heft_engine.training.stage_inputs import StageInputs


def started(inputs: RunInputs) -> Event:
    config = inputs.config
    data = StartedData(
        method=config.method,
        resolved={
            "stages": [stage.model_dump() for stage in config.stages],
            "task": inputs.encoder.task.to_json(),
            "dtype": dtype_name(inputs.lm.dtype),
            "base_quantization": config.base_quantization,
            "device": str(inputs.lm.device),
            "max_length": inputs.encoder.max_length,
            "base_model": {"source": inputs.base.source, "revision": inputs.base.revision},
        },
        rows=len(inputs.examples),
        truncated=sum(example.truncated for example in inputs.examples),
        total_steps=inputs.total_steps,
    )
    message = f"{config.method} on {config.model}: {len(inputs.examples)} rows, {inputs.total_steps} steps"
    return Event(code="STARTED", message=message, data=data)


def stage_started(config: TrainConfig, inputs: StageInputs, plan: StagePlan) -> list[Event]:
    """Returns STAGE_STARTED, and a WARNING if layers should run compiled and can't."""
    data = StageStartedData(
        stage=inputs.stage.type,
        stage_index=inputs.index,
        learning_rate=inputs.stage.learning_rate,
        trained_parameters=inputs.trained_parameters(),
        cache=plan.cache.to_json(),
        memory_bytes=plan.memory_bytes,
        host_memory_bytes=plan.host_memory_bytes,
        token_budget=plan.token_budget,
        compiled=plan.compiled,
        checkpointing=plan.checkpointing,
    )
    message = f"Stage {inputs.index + 1} of {len(config.stages)}: {inputs.stage.type}"
    events = [Event(code="STAGE_STARTED", message=message, data=data)]
    if plan.compile_failure is not None:
        message = f"Layers could not be compiled, so they run slower: {plan.compile_failure}"
        events.append(_warning(config, inputs.index, "not_compiled", message))
    return events


def stage_reused(inputs: RunInputs, state: RunState, key: str | None) -> list[Event]:
    """Returns the events of a stage that an earlier run trained, in place of those of its training.

    `state`: after the stage. key: of its result.
    """
    index = state.stage_index - 1
    stage = inputs.config.stages[index]
    data = StageReusedData(
        stage=stage.type,
        stage_index=index,
        step=inputs.first_step(index + 1),
        total_steps=inputs.total_steps,
        epoch=stage.n_epochs,
        key=key,
    )
    message = f"Stage {index + 1} of {len(inputs.config.stages)}: {stage.type}, reused from an equal stage"
    base = evaluation(state.evaluations[0], inputs.split, reused=True) if index == 0 else []
    return [
        *base,
        Event(code="STAGE_REUSED", message=message, data=data),
        *evaluation(state.evaluations[-1], inputs.split, reused=True, step=data["step"]),
        *failure_warnings(inputs.config, state),
    ]


def merge_verified(config: TrainConfig, index: int, merge: Merge[Any]) -> Event:
    message = f"Merged; float32 logits differ from the adapter's by {merge.record['float32']:.1e}"
    data = {"stage": config.stages[index].type, "stage_index": index, **merge.record}
    return Event(code="MERGE_VERIFIED", message=message, data=data)


def evaluation(record: Mapping[str, Any], split: str, **more: Any) -> list[Event]:
    """Returns an EVALUATION from a record of RunState.evaluations; none if there were no rows to evaluate on."""
    if "accuracy" not in record:
        return []
    low, high = record["interval_95"]
    rows = f"of {record['n']} {split} rows ({low:.1%} to {high:.1%})"
    metric = "" if record["metric"] == "accuracy" else f" {record['metric']}"
    message = f"After {record['stage']}: {record['accuracy']:.1%}{metric} {rows}"
    data = {name: value for name, value in record.items() if name not in ("right", "values")}
    return [Event(code="EVALUATION", message=message, data={"split": split, **data, **more})]


def failure_warnings(config: TrainConfig, state: RunState) -> list[Event]:
    """Returns a WARNING for each failure signature that the last finished stage shows."""
    index = state.stage_index - 1
    stage = config.stages[index]
    before, after = state.evaluations[-2:]
    signatures = [
        failure_signatures.below_previous(stage, before.get("accuracy"), after.get("accuracy")),
        failure_signatures.forgetting(stage, state.general_loss[0], state.general_loss[-1]),
    ]
    return [
        _warning(config, index, signature.name, signature.message) for signature in signatures if signature
    ]


def stage_ended(
    inputs: RunInputs, state: RunState, progress: Progress, seconds: float, memory_bytes: int | None
) -> list[Event]:
    """Returns the EVALUATION and WARNINGs of a stage that has been trained, and STAGE_COMPLETE.

    `state`: after the stage. seconds: of training, merge and evaluation in this process.
    """
    index, stages = state.stage_index - 1, inputs.config.stages
    data = StageCompleteData(
        stage=stages[index].type,
        stage_index=index,
        seconds=round(seconds, 3),
        steps=progress.step,
        tokens=progress.tokens,
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        general_loss=state.general_loss[-1],
        memory_bytes=memory_bytes,
        flops=state.costs[-1]["flops"],
    )
    return [
        *evaluation(state.evaluations[-1], inputs.split),
        *failure_warnings(inputs.config, state),
        Event(code="STAGE_COMPLETE", message=f"Stage {index + 1} of {len(stages)} is complete", data=data),
    ]


def checkpoint_saved(
    config: TrainConfig,
    index: int,
    step: int,
    kind: str,
    path: Path,
    losses: Mapping[str, float],
    key: str | None = None,
) -> Event:
    """step: of the run. key: of the stage's result, if later runs may reuse it."""
    data = CheckpointSavedData(
        stage=config.stages[index].type,
        stage_index=index,
        step=step,
        kind=kind,
        path=str(path),
        metrics={"step": step, **losses},
    )
    if key is not None:
        data["key"] = key
    return Event(code="CHECKPOINT_SAVED", message=f"Checkpoint at step {step}", data=data)


def stage_not_stored(config: TrainConfig, index: int, error: Exception) -> Event:
    message = f"The result of stage {index + 1} could not be stored for later runs: {error}"
    return _warning(config, index, "stage_not_kept", message)


def succeeded(state: RunState, bundle: Bundle, outcomes: dict[str, Any] | None) -> Event:
    data = SucceededData(
        bundle=str(bundle.path),
        evaluation=bundle.info.evaluation,
        parity={"merges": state.parity},
        trained_tokens=state.trained_tokens,
        costs=state.costs,
        outcomes=outcomes,
    )
    return Event(code="SUCCEEDED", message="The model is ready", data=data)


def _warning(config: TrainConfig, index: int, signature: str, message: str) -> Event:
    data = WarningData(signature=signature, stage=config.stages[index].type, stage_index=index)
    return Event(code="WARNING", message=message, level="warn", data=data)
