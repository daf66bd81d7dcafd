"""What a user asked for, as the engine runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heft_engine.commands.check import CheckFile
from heft_engine.commands.train import RunFile
from store.jobs.spec import TrainingSpec
from store.settings import StoreSettings
from worker.jobs.run_file import LocalRun, check_file, reuses, run_file, train_config


def spec(**fields: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"model": "org/base", "training_file": "file-1", "seed": 7, **fields})


@pytest.fixture
def settings() -> StoreSettings:
    return StoreSettings(database_url="d", redis_url="r", artifacts_url="a", model_dir=Path("/models"))


def test_nothing_of_what_was_asked_is_lost() -> None:
    asked = spec(
        method={"type": "heft_reversed", "heft_reversed": {"lora": {"rank": 2}, "reft": {"layers": [3]}}},
        task={"type": "choice", "labels": ["a", "b"]},
        early_stopping={"patience": 3},
        max_length=256,
        dtype="float32",
    )
    config = train_config(asked, revision=None)
    assert (config.model, config.method, config.seed) == ("org/base", "heft_reversed", 7)
    assert (config.max_length, config.dtype, config.early_stopping) == (256, "float32", asked.early_stopping)
    assert config.stages == asked.stages()
    assert [stage.type for stage in config.stages] == ["reft", "lora"]
    assert config.task == asked.task


def test_openais_hyperparameters_go_to_every_stage() -> None:
    hyperparameters = {"n_epochs": 5, "batch_size": 4, "learning_rate_multiplier": 2}
    asked = spec(method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}})
    config = train_config(asked, revision=None)
    assert config.method == "heft"
    assert [(s.n_epochs, s.batch_size, s.learning_rate_multiplier) for s in config.stages] == [(5, 4, 2)] * 2


@pytest.mark.parametrize(
    ("model", "revision", "pinned"),
    [
        ("org/base", "abc123", "org/base@abc123"),
        ("org/base@v1", "abc123", "org/base@v1"),
        ("org/base", None, "org/base"),
        ("smollm2-135m", "0.1.2", "smollm2-135m"),
    ],
)
def test_a_hub_model_is_pinned_to_the_revision_it_was_checked_with(
    model: str, revision: str | None, pinned: str
) -> None:
    assert train_config(spec(model=model), revision=revision).model == pinned


def test_the_engine_reads_the_run_file(settings: StoreSettings, tmp_path: Path) -> None:
    run = LocalRun(
        folder=tmp_path,
        train=tmp_path / "t",
        validation=tmp_path / "v",
        test=None,
        resume=tmp_path / "r",
        prefills=tmp_path / "p",
        owner="key_1",
    )
    config = train_config(spec(), revision=None)
    read = RunFile.model_validate(run_file(config, run, settings))
    assert read.config == config
    assert (read.train, read.eval, read.test) == (run.train, run.validation, None)
    assert (read.out, read.checkpoint_dir, read.resume) == (run.out, run.checkpoints, run.resume)
    assert (read.checkpoint_seconds, read.model_dir, read.cache_dir) == (300, Path("/models"), None)
    assert not read.allow_paths
    assert (read.memory_bytes, read.max_line_bytes, read.sharers) == (None, 8 * 1024**2, 1)
    bounded = settings.model_copy(
        update={"train_memory_bytes": 10**9, "max_line_bytes": 10**8, "trainers": 3}
    )
    own = RunFile.model_validate(run_file(config, run, bounded))
    assert (own.memory_bytes, own.max_line_bytes, own.sharers) == (10**9, 10**8, 3)
    assert (read.results, read.results_on_request, read.prefills) == (None, False, None)
    read = RunFile.model_validate(run_file(config, run, settings, reuse=True))
    assert (read.results, read.results_on_request) == (run.results, True)
    assert (read.prefills, read.prefill_bytes, read.owner) == (run.prefills, 4 * 1024**3, "key_1")
    assert not read.writes_validation
    assert RunFile.model_validate(run_file(config, run, settings, writes_validation=True)).writes_validation


@pytest.mark.parametrize(
    ("asked", "operator", "answer"),
    [
        ({}, {}, True),
        ({"reuse": False}, {}, False),
        ({}, {"reuse_days": 0}, False),
        ({}, {"reuse_bytes": 0}, False),
    ],
)
def test_a_job_reuses_if_its_user_and_the_operator_want_it(
    settings: StoreSettings, asked: dict[str, Any], operator: dict[str, Any], answer: bool
) -> None:
    assert reuses(spec(**asked), settings.model_copy(update=operator)) is answer


def test_a_dataset_that_is_known_says_what_its_task_is() -> None:
    task = train_config(spec(training_file="hub:openai/gsm8k"), revision=None).task
    assert (task.type, task.metrics) == ("text", ["final_number", "exact_match"])
    assert task.template == "Question: {prompt}\nAnswer:"


def test_the_engine_reads_the_check_file(settings: StoreSettings, tmp_path: Path) -> None:
    files = {"training_file": "/rows.jsonl", "test_file": "hub:org/data:test"}
    read = CheckFile.model_validate(check_file(spec(), files, tmp_path, settings))
    assert read.files == files
    assert (read.out, read.max_rows, read.max_line_bytes) == (
        tmp_path,
        settings.max_rows,
        settings.max_line_bytes,
    )
