"""A user's request as the engine's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heft_engine.config.run_file import CheckFile, FileField, RunFile
from store.jobs.spec import TrainingSpec
from store.settings import StoreSettings
from worker.jobs.run_file import check_file, reuses, run_file, train_config


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


ROWS: dict[FileField, Path] = {"training_file": Path("/t"), "validation_file": Path("/v")}


def test_the_run_file_has_the_job_s_rows_and_the_operator_s_settings(
    settings: StoreSettings, tmp_path: Path
) -> None:
    config = train_config(spec(), revision=None)
    plain = run_file(config, tmp_path, ROWS, settings, resume=tmp_path / "r")
    assert RunFile.model_validate_json(plain.model_dump_json()) == plain
    assert plain.config == config
    assert (plain.train, plain.eval, plain.test) == (Path("/t"), Path("/v"), None)
    assert plain.out.parent == tmp_path
    assert plain.processes == 1
    changed = settings.model_copy(update={"train_processes": 4})
    assert run_file(config, tmp_path, ROWS, changed).processes == 4
    assert (plain.checkpoint_dir, plain.resume) == (tmp_path / "checkpoints", tmp_path / "r")
    assert (plain.checkpoint_seconds, plain.model_dir, plain.cache_dir) == (300, Path("/models"), None)
    assert not plain.allow_paths
    assert not plain.evaluate_validation
    assert (plain.memory_bytes, plain.max_line_bytes, plain.sharers) == (None, 8 * 1024**2, 1)
    assert (plain.cache_memory_bytes, plain.cache_disk_bytes) == (None, 0)
    limits = {
        "train_memory_bytes": 10**9,
        "max_line_bytes": 10**8,
        "trainers": 3,
        "cache_memory_bytes": 10**7,
        "cache_disk_bytes": 10**6,
    }
    bounded = run_file(config, tmp_path, ROWS, settings.model_copy(update=limits), evaluate_validation=True)
    assert (bounded.memory_bytes, bounded.max_line_bytes, bounded.sharers) == (10**9, 10**8, 3)
    assert (bounded.cache_memory_bytes, bounded.cache_disk_bytes) == (10**7, 10**6)
    assert bounded.evaluate_validation


def test_a_job_that_reuses_stages_is_told_where_they_and_the_activations_are(
    settings: StoreSettings, tmp_path: Path
) -> None:
    config = train_config(spec(), revision=None)
    plain = run_file(config, tmp_path, ROWS, settings, owner="key_1")
    assert (plain.stage_dir, plain.stages_on_request, plain.activation_dir) == (None, False, None)
    reuse = run_file(config, tmp_path, ROWS, settings, activation_dir=Path("/p"), owner="key_1")
    assert (reuse.stage_dir, reuse.stages_on_request) == (tmp_path / "stages", True)
    assert (reuse.activation_dir, reuse.activation_bytes, reuse.owner) == (Path("/p"), 4 * 1024**3, "key_1")


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


def test_the_check_file_has_the_job_s_files_and_the_operator_s_limits(
    settings: StoreSettings, tmp_path: Path
) -> None:
    files: dict[FileField, str] = {"training_file": "/rows.jsonl", "test_file": "hub:org/data:test"}
    check = check_file(spec(), files, tmp_path, settings)
    assert CheckFile.model_validate_json(check.model_dump_json()) == check
    assert check.files == files
    assert (check.out, check.max_rows, check.max_line_bytes) == (
        tmp_path,
        settings.max_rows,
        settings.max_line_bytes,
    )
