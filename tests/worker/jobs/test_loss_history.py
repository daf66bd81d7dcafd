"""The loss history has every step once, through checkpoints and resumes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from worker.jobs.loss_history import LossHistory


def event(code: str, **data: Any) -> dict[str, Any]:
    return {"code": code, "data": data}


def metrics(step: int) -> dict[str, Any]:
    return event("METRICS", stage="lora", stage_index=0, step=step, epoch=1, loss=1 / step, learning_rate=0.1)


def table(history: LossHistory, path: Path) -> list[dict[str, str]]:
    history.save(path)
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_losses_and_scores_have_their_step(tmp_path: Path) -> None:
    history = LossHistory()
    history.add(
        event("EVALUATION", stage="base", stage_index=None, accuracy=0.5, correct=1, n=2, split="test")
    )
    history.add(metrics(1))
    history.add(event("EPOCH_COMPLETE", stage="lora", stage_index=0, epoch=1, train_loss=9.0, eval_loss=0.25))
    history.add(event("STAGE_STARTED", stage="lora", stage_index=0))
    assert table(history, tmp_path / "t.csv") == [
        {"step": "0", "stage": "base", "accuracy": "0.5", "correct": "1", "n": "2", "split": "test"},
        {
            "step": "1",
            "stage": "lora",
            "stage_index": "0",
            "epoch": "1",
            "train_loss": "1.0",
            "learning_rate": "0.1",
        },
        {"step": "1", "stage": "lora", "stage_index": "0", "epoch": "1", "valid_loss": "0.25"},
    ]


def test_it_continues_from_a_checkpoint(tmp_path: Path) -> None:
    base = event("EVALUATION", stage="base", stage_index=None, accuracy=0.5, correct=1, n=2, split="test")
    before = LossHistory()
    for past in (base, metrics(1), metrics(2)):
        before.add(past)
    before.save(tmp_path / "history.csv")
    resumed = LossHistory.load(tmp_path / "history.csv")
    resumed.add(metrics(3))
    straight = LossHistory()
    for past in (base, metrics(1), metrics(2), metrics(3)):
        straight.add(past)
    assert table(resumed, tmp_path / "a.csv") == table(straight, tmp_path / "b.csv")


def test_without_a_checkpoint_it_is_empty(tmp_path: Path) -> None:
    assert table(LossHistory.load(tmp_path / "none.csv"), tmp_path / "t.csv") == []
