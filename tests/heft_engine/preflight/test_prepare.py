"""Checks of a job as a whole: references, files, model and settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from heft_engine.config.train import EarlyStopping, ReftStage, TrainConfig, recipe
from heft_engine.data.samples import generate
from heft_engine.errors import ConfigError, ModelError
from heft_engine.preflight.prepare import Directories, prepare


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def question(number: int, answer: object = True, passage: str = "It is so.") -> dict[str, object]:
    return {"question": f"is it {number}", "passage": passage, "answer": answer}


@pytest.fixture
def directories(tmp_path: Path, tiny_llama_dir: Path) -> Directories:
    (tmp_path / "models").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copytree(tiny_llama_dir, tmp_path / "models" / "tiny")
    return Directories(out=tmp_path / "out", model_dir=tmp_path / "models")


def test_samples_are_written_and_checked(directories: Directories) -> None:
    config = TrainConfig(model="tiny", stages=recipe("heft"))
    files = {"training_file": "sample:passages", "validation_file": "sample:passages:test"}
    prepared = prepare(config, files, directories)  # type: ignore[arg-type]
    written = [json.loads(line) for line in prepared.written["training_file"].read_text().splitlines()]
    assert written == generate("passages", "train")
    assert prepared.report.error() is None
    assert prepared.report.warnings == []
    said = json.loads(json.dumps(prepared.to_json()))
    assert said["base_model"]["source"] == "directory"
    assert said["base_model"]["n_layers"] == 4
    assert said["files"]["validation_file"]["rows"] == 200


def test_uploaded_files_stay_where_they_are(directories: Directories) -> None:
    path = write(directories.out / "rows.jsonl", [question(1)])
    prepared = prepare(
        TrainConfig(model="tiny", stages=recipe("lora")), {"training_file": str(path)}, directories
    )
    assert prepared.written == {}
    assert prepared.report.files["training_file"].rows == 1


def test_settings_that_the_model_does_not_allow(directories: Directories) -> None:
    path = str(write(directories.out / "rows.jsonl", [question(1)]))
    config = TrainConfig(model="tiny", stages=[ReftStage(layers=[9])])
    with pytest.raises(ConfigError, match="layers 0 to 3") as caught:
        prepare(config, {"training_file": path}, directories)
    assert caught.value.param == "reft.layers"
    with pytest.raises(ConfigError, match="takes 512 tokens"):
        prepare(
            config.model_copy(update={"stages": recipe("lora"), "max_length": 4_096}),
            {"training_file": path},
            directories,
        )
    watching = config.model_copy(update={"stages": recipe("lora"), "early_stopping": EarlyStopping()})
    with pytest.raises(ConfigError, match="needs a validation_file"):
        prepare(watching, {"training_file": path}, directories)
    texts = str(write(directories.out / "texts.jsonl", [{"prompt": "Say it:", "completion": "it"}]))
    by_accuracy = watching.model_copy(update={"early_stopping": EarlyStopping(metric="valid_accuracy")})
    with pytest.raises(ConfigError, match="tasks with labels") as caught:
        prepare(by_accuracy, {"training_file": texts, "validation_file": texts}, directories)
    assert caught.value.param == "early_stopping.metric"
    with pytest.raises(ModelError, match="no model 'absent'"):
        prepare(config.model_copy(update={"model": "absent"}), {"training_file": path}, directories)
    with pytest.raises(ConfigError, match="sample 'absent' does not exist"):
        prepare(
            TrainConfig(model="tiny", stages=recipe("lora")), {"training_file": "sample:absent"}, directories
        )
