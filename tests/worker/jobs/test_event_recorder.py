"""Events of the engine as the job shows them: its stage, and the latest metrics of each stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from store.jobs.spec import TrainingSpec
from worker.jobs.attempt import Attempt
from worker.jobs.event_recorder import EventRecorder
from worker.jobs.loss_history import LossHistory

SPEC = TrainingSpec(model="tiny", training_file="sample:passages", seed=0)


def recorded(event: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that an event changes."""
    columns: dict[str, Any] = {}
    attempt = SimpleNamespace(
        claim=SimpleNamespace(spec=SPEC), write=lambda operation: columns.update(operation.keywords)
    )
    recorder = EventRecorder(
        cast("Attempt", attempt), LossHistory(), save_checkpoint=print, fetch_stage_results=print
    )
    recorder.handle({"message": "", "level": "info", "type": "metrics", **event})
    return columns


@pytest.mark.parametrize(
    ("stage", "epoch", "stopped_early", "shown"),
    [
        ("lora", 2, False, None),
        ("lora", 2, True, "merge"),
        ("lora", 3, False, "merge"),
        ("reft", 2, True, "evaluate"),
    ],
)
def test_a_stage_that_stops_early_is_over(
    stage: str, epoch: int, stopped_early: bool, shown: str | None
) -> None:
    data: dict[str, Any] = {"stage": stage, "stage_index": int(stage == "reft"), "epoch": epoch, "step": 9}
    data |= {"valid_accuracy": 0.75, **({"stopped_early": True} if stopped_early else {})}
    columns = recorded({"code": "EPOCH_COMPLETE", "data": data})
    assert columns["stage"] == shown
    assert columns["metrics"] == {stage: {"valid_accuracy": 0.75}}
