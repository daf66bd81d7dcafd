"""The loss history has every step once, through checkpoints and resumes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from worker.jobs.loss_history import LossHistory


def event(code: str, **data: Any) -> dict[str, Any]:
    return {"code": code, "data": data}


def metrics(step: int) -> dict[str, Any]:
    measured = {"loss": 1 / step, "train_mean_token_accuracy": 0.5}
    return event("METRICS", stage="lora", stage_index=0, step=step, epoch=1, learning_rate=0.1, **measured)


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
    measured = {"train_loss": 9.0, "valid_loss": 0.25, "valid_mean_token_accuracy": 0.75}
    history.add(event("EPOCH_COMPLETE", stage="lora", stage_index=0, epoch=1, **measured))
    history.add(event("STAGE_STARTED", stage="lora", stage_index=0))
    assert table(history, tmp_path / "t.csv") == [
        {"step": "0", "stage": "base", "accuracy": "0.5", "correct": "1", "n": "2", "split": "test"},
        {
            "step": "1",
            "stage": "lora",
            "stage_index": "0",
            "epoch": "1",
            "train_loss": "1.0",
            "train_accuracy": "0.5",
            "valid_loss": "0.25",
            "valid_mean_token_accuracy": "0.75",
            "learning_rate": "0.1",
        },
    ]


def test_its_first_columns_are_openais(tmp_path: Path) -> None:
    history = LossHistory()
    history.add(metrics(1))
    history.save(tmp_path / "t.csv")
    openais = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"
    assert (tmp_path / "t.csv").read_text().startswith(openais)


def test_it_continues_from_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text(
        "step,stage,stage_index,epoch,train_loss,learning_rate,tokens,valid_loss,accuracy,correct,n,split\n"
        "1,lora,0,1,0.5,0.1,40,,,,,\n1,lora,0,1,,,,0.25,,,,\n"
    )
    history = LossHistory.load(tmp_path / "history.csv")
    history.add(event("EVALUATION", stage="lora", stage_index=0, accuracy=0.5))
    common = {"step": "1", "stage": "lora", "stage_index": "0"}
    assert table(history, tmp_path / "t.csv") == [
        {**common, "epoch": "1", "train_loss": "0.5", "learning_rate": "0.1", "tokens": "40"},
        {**common, "epoch": "1", "valid_loss": "0.25"},
        {**common, "accuracy": "0.5"},
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
