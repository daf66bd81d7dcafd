"""Training that fails: each kind of failure has a name and advice, and leaves no bundle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import LORA, REFT, RunRecord, but, config, parse, run, tensors, yes_no

from heft_engine.adapters.reft import LoreftIntervention
from heft_engine.config.train import EarlyStopping, LoraStage, ReftStage
from heft_engine.errors import TrainingError
from heft_engine.training import loop

VALIDATION = parse(yes_no(16, seed=1))


def test_weight_decay_meets_w_and_never_r(tiny_llama_dir: Path, tmp_path: Path) -> None:
    ends = {}
    for decay in (0.0, 1.0):
        stage = but(REFT, weight_decay=decay, n_epochs=8, learning_rate=0.05)
        ends[decay] = tensors(run(config(tiny_llama_dir, "reft", [stage]), tmp_path / str(decay)))
    for state in ends.values():
        rotation = state["0/rotate_layer"]
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(2), atol=1e-5, rtol=0)
    assert ends[1.0]["0/weight"].norm() < 0.8 * ends[0.0]["0/weight"].norm()


def test_a_rotation_that_collapses_fails_the_run(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R collapses when its raw parameter meets weight decay."""
    monkeypatch.setattr(LoreftIntervention, "no_decay", lambda self: set())
    stage = but(REFT, weight_decay=0.1)
    with pytest.raises(
        TrainingError, match=r"rotation R collapsed .* R must not meet weight decay"
    ) as failed:
        run(config(tiny_llama_dir, "reft", [stage]), tmp_path / "out")
    assert failed.value.code == "rotation_collapsed"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("patience", [None, 1])
@pytest.mark.parametrize("stage", [LORA, REFT])
def test_training_that_does_not_train_fails(
    tiny_llama_dir: Path, tmp_path: Path, stage: LoraStage | ReftStage, patience: int | None, dropout: float
) -> None:
    stopping = EarlyStopping(patience=patience) if patience else None
    still = but(stage, learning_rate=1e-30, dropout=dropout, n_epochs=9)
    record = RunRecord()
    with pytest.raises(
        TrainingError, match=rf"does not train: .*\. Raise {stage.type}\.learning_rate"
    ) as failed:
        run(
            config(tiny_llama_dir, stages=[still], early_stopping=stopping),
            tmp_path,
            None,
            VALIDATION,
            record=record,
        )
    assert failed.value.code == "does_not_train"
    assert len(record.losses) == (6 if patience else loop.TRAINS_AFTER)


@pytest.fixture
def spoil_gradients(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """`spoil_gradients(step, factor)` multiplies all gradients by the factor from that step on, counted from 1."""

    def spoil(first: int, factor: float) -> None:
        steps = itertools.count(1)

        def clip(parameters: list[torch.nn.Parameter], limit: float) -> None:
            if next(steps) >= first:
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad.mul_(factor)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)

    return spoil


@pytest.mark.parametrize(("stage", "first"), [(LORA, 3), (LORA, 6), (REFT, 3), (REFT, 6)])
def test_a_loss_that_is_no_number_fails_the_run_and_names_the_rate(
    tiny_llama_dir: Path,
    tmp_path: Path,
    spoil_gradients: Callable[[int, float], None],
    stage: LoraStage | ReftStage,
    first: int,
) -> None:
    """The run fails too when the last of six steps breaks the model and no later step sees it."""
    spoil_gradients(first, math.nan)
    record, kind = RunRecord(), stage.type
    with pytest.raises(
        TrainingError, match=rf"loss rose to nan\. Lower {kind}\.learning_rate \(now"
    ) as failed:
        run(config(tiny_llama_dir, stages=[stage]), tmp_path / "out", record=record)
    assert failed.value.code == "diverged"
    assert len(record.losses) == first
    assert not (tmp_path / "out").exists()


def test_divergence_is_warned_of_once(
    tiny_llama_dir: Path, tmp_path: Path, spoil_gradients: Callable[[int, float], None]
) -> None:
    spoil_gradients(40, -1.0)
    stage = but(LORA, n_epochs=25, learning_rate=2e-2, scheduler="constant")
    record = run(config(tiny_llama_dir, "lora", [stage]), tmp_path / "out")
    (warning,) = [event for event in record.events if event.data.get("signature") == "diverges"]
    assert (warning.code, warning.level, warning.data["stage"]) == ("WARNING", "warn", "lora")
    assert "Lower lora.learning_rate (now 2.0e-02) or lora.rank (now 8)" in warning.message
    before = [
        event.data["step"]
        for event in record.events[: record.events.index(warning)]
        if event.code == "METRICS"
    ]
    assert 40 < before[-1] < 75
