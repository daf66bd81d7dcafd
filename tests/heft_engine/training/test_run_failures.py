"""Runs that are refused before they train, and the failure signatures that show at the end of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_runs import LORA, REFT, ROWS, RunRecord, but, config, parse, run
from tiny_models import ENGLISH

from heft_engine.bundle.format import BundleInfo, write_bundle
from heft_engine.data import general_text
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError, RowError, TrainingError
from heft_engine.evaluation.evaluate import Evaluation
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.training import failure_signatures, result
from heft_engine.training import run as run_module

QUICK = {"n_epochs": 1, "batch_size": 6}


def test_a_stage_that_ends_below_the_one_before_is_named(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter([5, 8, 6])  # base, lora, reft

    measured = result.evaluate

    def scripted(*arguments: Any, **options: Any) -> Evaluation:
        right, scores = next(results), measured(*arguments, **options).scores
        return Evaluation.of([i < right for i in range(10)], scores)

    monkeypatch.setattr(result, "evaluate", scripted)
    record = run(config(tiny_llama_dir), tmp_path / "out", None, parse(ROWS["yes_no"](10)))
    (warning,) = [event for event in record.events if event.data.get("signature") == "stage_below_previous"]
    assert (warning.code, warning.level, warning.data["stage_index"]) == ("WARNING", "warn", 1)
    assert (
        "Stage reft ends below the one before it: 60.0% after 80.0%. Lower reft.learning_rate"
        in warning.message
    )


def test_forgetting_is_named_with_what_to_do(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny random model knows so little that it can't forget the usual amount; at this rate rounding decides how much.
    monkeypatch.setattr(failure_signatures, "FORGETTING", 0.002)
    monkeypatch.setattr(general_text, "topics", {"licence": ENGLISH})
    runs: dict[float, RunRecord] = {}
    for rate in (0.5, 1e-6):
        settings = config(
            tiny_llama_dir, "lora", [but(LORA, learning_rate=rate, n_epochs=6, rank=8, alpha=256)]
        )
        runs[rate] = run(settings, tmp_path / str(rate), None, parse(ROWS["yes_no"](4)))
    base_loss, tuned_loss = runs[0.5].one("SUCCEEDED")["evaluation"]["general_loss"]
    assert tuned_loss - base_loss > 0.002
    (warning,) = [event for event in runs[0.5].events if event.data.get("signature") == "forgetting"]
    assert (
        f"from {base_loss:.2f} to {tuned_loss:.2f} nats a token. Lower lora.learning_rate or lora.rank"
        in warning.message
    )
    assert not [event for event in runs[1e-6].events if event.data.get("signature") == "forgetting"]


@pytest.mark.parametrize("changed", ["template", "positions"])
def test_serving_that_would_differ_from_training_fails_the_run(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    if changed == "template":
        other = {"type": "yes_no", "template": "{question}", "labels": ["yes", "no"]}
        monkeypatch.setattr(Task, "to_json", lambda self: other)
    else:
        monkeypatch.setattr(result, "write_bundle", _with_other_positions)
    with pytest.raises(TrainingError, match="serving would") as failed:
        run(config(tiny_llama_dir, "reft", [but(REFT, **QUICK)]), tmp_path / "out")
    assert failed.value.code == "position_mismatch"


def _with_other_positions(
    path: Path, info: BundleInfo, adapters: Any, interventions: list[PlacedIntervention], *rest: Any
) -> None:
    for stage in info.stages:
        stage["positions"] = "f1"
    moved = [
        PlacedIntervention(layer=s.layer, positions="f1", intervention=s.intervention) for s in interventions
    ]
    write_bundle(path, info, adapters, moved, *rest)


# -- refused before anything is trained


def test_an_output_directory_that_is_not_empty_is_refused_at_once(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "something").touch()
    record = RunRecord()
    with pytest.raises(ConfigError, match="is not empty") as refused:
        run(config(tiny_llama_dir), tmp_path, record=record)
    assert (refused.value.param, record.events) == ("out", [])


@pytest.mark.parametrize(
    ("stage", "param"),
    [
        (but(REFT, layers=[4]), "reft.layers"),
        (but(REFT, rank=33), "reft.rank"),
        (but(LORA, layers=[7]), "lora.layers"),
        (but(LORA, target_modules=["attn"]), "lora.target_modules"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, stage: Any, param: str
) -> None:
    record = RunRecord()
    with pytest.raises(ConfigError) as refused:
        run(config(tiny_llama_dir, stages=[LORA, stage]), tmp_path / "out", record=record)
    assert refused.value.param == param
    assert record.data("METRICS") == []


def test_no_rows_and_too_long_a_length_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RowError, match="no training rows"):
        run_module.train(config(tiny_llama_dir), [], [], tmp_path / "out", lambda event: None)
    with pytest.raises(ConfigError, match="takes 512 tokens") as refused:
        run(config(tiny_llama_dir, max_length=513), tmp_path / "out")
    assert refused.value.param == "max_length"
