"""Checkpoints of epochs: the model that was validated, ready to be served. They change nothing in their run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_runs import LORA, REFT, VARIANTS, RunRecord, assert_equal, but, config, parse, run, yes_no

from heft_engine.config.train import Stage
from heft_engine.evaluation.evaluate import mean_loss
from heft_engine.events import Event
from heft_engine.runtime.random_state import RandomState
from heft_engine.serving.predictor import load
from heft_engine.training import checkpoint

VALIDATION = parse(yes_no(16, seed=1))


class Loading(RunRecord):
    """A record that loads each epoch's model while its files are there, and keeps its validation loss by step."""

    def __init__(self) -> None:
        super().__init__()
        self.served: dict[int, float] = {}
        self.events = _Events(self)  # type: ignore[assignment]


class _Events(list[Event]):
    def __init__(self, record: Loading) -> None:
        self._record = record

    def append(self, event: Event) -> None:
        super().append(event)
        if event.code == "CHECKPOINT_SAVED" and event.data["kind"] == "epoch":
            random_state = RandomState.current()
            predictor = load(Path(event.data["path"]) / "bundle")  # checks the probe rows
            examples = [e.supervised() for row in VALIDATION for e in predictor.encoder.encode(row)]
            self._record.served[event.data["step"]] = mean_loss(predictor.lm, examples)
            random_state.restore()


def train(model: Path, folder: Path, stages: list[Stage], **options: Any) -> Loading:
    record = Loading()
    run(config(model, "recipe", stages), folder / "out", None, VALIDATION, record=record, **options)
    return record


@pytest.mark.parametrize(
    "stages",
    [
        [but(LORA, n_epochs=3, dropout=0.2), but(REFT, n_epochs=3, dropout=0.2)],
        [but(REFT, n_epochs=2), but(VARIANTS[1], n_epochs=2)],
        [but(VARIANTS[2], n_epochs=2)],
    ],
    ids=["heft", "reft, then dora", "pissa"],
)
def test_an_epoch_s_model_is_the_one_that_was_validated(
    tiny_llama_dir: Path, tmp_path: Path, stages: list[Stage]
) -> None:
    saved = {"checkpoint_dir": tmp_path / "checkpoints", "n_checkpoints": 9}
    record = train(tiny_llama_dir, tmp_path / "with", stages, **saved)
    epochs = [(data["stage_index"], data["epoch"], data["step"]) for data in record.data("EPOCH_COMPLETE")]
    inside = [step for index, epoch, step in epochs if epoch < stages[index].n_epochs]
    assert list(record.served) == inside
    losses = {data["step"]: data["valid_loss"] for data in record.data("EPOCH_COMPLETE")}
    assert record.served == pytest.approx({step: losses[step] for step in inside}, abs=1e-4)
    metrics = {
        data["step"]: data["metrics"] for data in record.data("CHECKPOINT_SAVED") if data["kind"] == "epoch"
    }
    assert {step: metrics[step]["valid_loss"] for step in inside} == {step: losses[step] for step in inside}

    plain = train(tiny_llama_dir, tmp_path / "without", stages)
    assert plain.served == {}
    assert record.losses == plain.losses
    assert_equal(record, plain)


def test_early_epochs_that_follow_one_another_closely_have_none(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[Stage] = [but(REFT, n_epochs=4), but(REFT, n_epochs=3, layers=[3])]
    saved: dict[str, Any] = {"checkpoint_dir": tmp_path / "checkpoints", "n_checkpoints": 3}
    record = train(tiny_llama_dir, tmp_path / "few", stages, **saved)
    assert list(record.served) == [9, 15, 18], "the last three of five, at the ends of epochs of three steps"
    assert len(list((tmp_path / "checkpoints").glob("*-epoch"))) == 3
    monkeypatch.setattr(checkpoint, "EPOCH_SECONDS", 0.0)
    record = train(tiny_llama_dir, tmp_path / "all", stages, **saved)
    assert list(record.served) == [3, 6, 9, 15, 18]
