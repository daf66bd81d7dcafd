"""What a run says of itself, as events: how it was resolved, how a stage was planned, what was measured behind it.

It does NOT decide anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from heft_engine.adapters.adapter import Adapter
from heft_engine.events import Event
from heft_engine.runtime.devices import dtype_name
from heft_engine.training import failure_signatures
from heft_engine.training.plan import StagePlan

if TYPE_CHECKING:
    from heft_engine.training.run import Run


def announce(run: Run) -> None:
    resolved = {
        "stages": [stage.model_dump() for stage in run.config.stages],
        "task": run.encoder.task.to_json(),
        "dtype": dtype_name(run.lm.dtype),
        "device": str(run.lm.device),
        "max_length": run.encoder.max_length,
        "base_model": {"source": run.base.source, "revision": run.base.revision},
    }
    run.emit(
        "STARTED",
        f"{run.config.method} on {run.config.model}: {len(run.examples)} rows, {run.total_steps} steps",
        method=run.config.method,
        resolved=resolved,
        rows=len(run.examples),
        truncated=sum(example.truncated for example in run.examples),
        total_steps=run.total_steps,
    )


def tell_plan(run: Run, index: int, trainable: Adapter, plan: StagePlan) -> None:
    stage = run.config.stages[index]
    run.emit_stage(
        "STAGE_STARTED",
        f"Stage {index + 1} of {len(run.config.stages)}: {stage.type}",
        index,
        learning_rate=stage.learning_rate,
        trained_parameters=sum(p.numel() for p in trainable.parameters().values()),
        cache=plan.cache.to_json(),
        memory_bytes=plan.memory_bytes,
        **plan.of_progress,
    )
    if plan.compile_failure is not None:
        message = f"Layers could not be compiled and run as they are, slower: {plan.compile_failure}"
        data = {"signature": "not_compiled", "stage": stage.type, "stage_index": index}
        run.on_event(Event(code="WARNING", message=message, level="warn", data=data))


def tell_evaluation(run: Run, record: dict[str, Any], **more: Any) -> None:
    """Says what was measured after a stage; nothing without rows to measure on."""
    if "accuracy" not in record:
        return
    low, high = record["interval_95"]
    of = f"of {record['n']} {run.split} rows ({low:.1%} to {high:.1%})"
    metric = "" if record["metric"] == "accuracy" else f" {record['metric']}"
    message = f"After {record['stage']}: {record['accuracy']:.1%}{metric} {of}"
    shown = {name: value for name, value in record.items() if name not in ("right", "values")}
    run.emit("EVALUATION", message, split=run.split, **shown, **more)


def tell_warnings(run: Run, index: int) -> None:
    stage = run.config.stages[index]
    before, after = run.state.evaluations[-2:]
    found = [
        failure_signatures.below_previous(stage, before.get("accuracy"), after.get("accuracy")),
        failure_signatures.forgetting(stage, run.state.general_loss[0], run.state.general_loss[-1]),
    ]
    for signature in filter(None, found):
        data = {"signature": signature.name, "stage": stage.type, "stage_index": index}
        run.on_event(Event(code="WARNING", message=signature.message, level="warn", data=data))
