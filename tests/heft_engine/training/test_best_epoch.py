"""Early stopping by each metric: which epoch is the best, when a stage ends, and what the bundle holds then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import LORA, REFT, assert_equal, but, config, interrupted, parse, run, text, yes_no
from torch import nn

from heft_engine.config.train import EarlyStopping, StoppingMetric, TrainConfig
from heft_engine.errors import ConfigError
from heft_engine.serving.predictor import load
from heft_engine.training.best_epoch import BestEpoch
from heft_engine.training.progress import Progress

VALIDATION = parse(yes_no(16, seed=1))
#: Of each epoch: valid_loss (None: infinite), valid_mean_token_accuracy, valid_accuracy.
EPOCHS = [(0.9, 0.5, 0.5), (0.7, 0.4, 0.75), (0.6, 0.5, 0.75), (0.65, 0.6, 0.5), (None, 0.6, 0.75)]


@pytest.mark.parametrize(
    ("metric", "best"), [("valid_loss", 3), ("valid_mean_token_accuracy", 4), ("valid_accuracy", 3)]
)
def test_the_best_epoch_is_that_of_the_metric(metric: StoppingMetric, best: int) -> None:
    """Equal accuracies are ordered by the loss; an infinite loss is worse than any other."""
    parameter = nn.Parameter(torch.zeros(1))
    epochs = BestEpoch(settings=EarlyStopping(patience=9, metric=metric))
    progress = Progress()
    for number, (loss, token_accuracy, accuracy) in enumerate(EPOCHS, 1):
        progress.epoch, progress.valid_loss = number, loss
        progress.valid_token_accuracy, progress.valid_accuracy = token_accuracy, accuracy
        parameter.data.fill_(number)
        epochs.end_epoch(progress, {"p": parameter})
    assert progress.best_epoch == best
    assert (progress.bad_epochs, progress.finished) == (len(EPOCHS) - best, False)
    assert epochs.take(progress)["p"].item() == best
    assert (progress.valid_loss, progress.valid_token_accuracy, progress.valid_accuracy) == EPOCHS[best - 1]


def by_accuracy(model: Path) -> TrainConfig:
    stages = [but(LORA, n_epochs=12, learning_rate=0.02), but(REFT, n_epochs=12, learning_rate=0.1)]
    stopping = EarlyStopping(patience=2, metric="valid_accuracy")
    return config(model, "recipe", stages, early_stopping=stopping)


def test_a_stage_stops_by_the_share_of_right_answers_and_the_next_one_goes_on(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    record = run(
        by_accuracy(tiny_llama_dir),
        tmp_path / "out",
        None,
        VALIDATION,
        checkpoint_dir=tmp_path / "checkpoints",
    )
    ends = [data["metrics"] for data in record.data("CHECKPOINT_SAVED") if data["kind"] == "stage"]
    for index, complete in enumerate(record.data("STAGE_COMPLETE")):
        epochs = [data for data in record.data("EPOCH_COMPLETE") if data["stage_index"] == index]
        values = [(data["valid_accuracy"], -data["valid_loss"]) for data in epochs]
        best = values.index(max(values))
        assert (complete["epochs"], complete["best_epoch"]) == (len(epochs), best + 1)
        assert len(epochs) == best + 3 < 12, "two epochs after the best one"
        assert [data.get("stopped_early") for data in epochs] == [None] * (len(epochs) - 1) + [True]
        evaluation = record.data("EVALUATION")[index + 1]
        assert evaluation["accuracy"] == epochs[best]["valid_accuracy"] == ends[index]["valid_accuracy"]
    assert len(ends) == 2
    answers = load(tmp_path / "out", device="cpu").predict(VALIDATION)
    right = sum(answer.answer == row.answer for answer, row in zip(answers, VALIDATION, strict=True))
    assert right / len(VALIDATION) == ends[-1]["valid_accuracy"]


def test_a_resumed_stage_stops_at_the_same_epoch(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = by_accuracy(tiny_llama_dir)
    whole = run(settings, tmp_path / "whole", None, VALIDATION)
    calls = len(whole.losses) + len(whole.data("EPOCH_COMPLETE"))
    losses, last = interrupted(settings, tmp_path / "parts", list(range(3, calls, 7)), VALIDATION)
    assert losses == whole.losses
    assert_equal(last, whole)


def test_epochs_checkpoints_have_the_share_of_right_answers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """With test rows too: it is of the validation rows."""
    record = run(
        config(tiny_llama_dir, "lora"),
        tmp_path / "out",
        None,
        VALIDATION,
        test_rows=VALIDATION[:5],
        checkpoint_dir=tmp_path / "checkpoints",
        n_checkpoints=1,
    )
    saved = [data for data in record.data("CHECKPOINT_SAVED") if data["kind"] in ("epoch", "stage")]
    assert [data["kind"] for data in saved] == ["epoch", "stage"]
    for data in saved:
        answers = load(Path(data["path"]) / "bundle", device="cpu").predict(VALIDATION)
        right = sum(answer.answer == row.answer for answer, row in zip(answers, VALIDATION, strict=True))
        assert data["metrics"]["valid_accuracy"] == right / len(VALIDATION)
    assert all("valid_accuracy" not in data for data in record.data("EPOCH_COMPLETE")), "nobody asked for it"


def test_text_has_no_share_of_right_answers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = parse(text(8))
    stopping = EarlyStopping(metric="valid_accuracy")
    with pytest.raises(ConfigError, match="tasks with labels") as refusal:
        run(config(tiny_llama_dir, "lora", early_stopping=stopping), tmp_path / "out", rows, rows)
    assert refusal.value.param == "early_stopping.metric"
