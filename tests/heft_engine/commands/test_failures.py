"""Failures of the command line: one FAILED event that names the setting, and exit code 1."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_command import Command, Printed, command, write_rows
from engine_runs import LORA, but, choice, config, run, text, yes_no

from heft_engine.commands.child_process import report_failures
from heft_engine.commands.train_config import config_from_settings
from heft_engine.config.train import EarlyStopping
from heft_engine.errors import ConfigError, EngineError

__all__ = ["command"]


def test_settings_reach_their_stage() -> None:
    settings = config_from_settings(
        "m",
        "heft_interleaved",
        [
            *("lora.rank=4", "lora.layers=[1,2]", "reft.layers=7", "reft.positions=f1+l1"),
            "task.type=choice",
            'task.labels=["a","b"]',
            "task.template={question} 1=2",
            "early_stopping.patience=3",
            "max_length=99",
        ],
        seed=8,
    )
    lora, reft, *_ = settings.stages
    assert lora.rank == 4
    assert (lora.layers, reft.layers) == ([1, 2], [7])
    assert settings.task.template == "{question} 1=2"
    assert (settings.early_stopping, settings.max_length, settings.seed) == (EarlyStopping(patience=3), 99, 8)


@pytest.mark.parametrize(
    ("setting", "param", "says"),
    [
        ("lora.rnak=8", "lora.rnak", "there are n_epochs, learning_rate"),
        ("lora.rank=0", "lora.rank", "greater than or equal to 1"),
        ("lora.rank=eight", "lora.rank", "valid integer"),
        ("lora.learning_rate=fast", "lora.learning_rate", ""),
        ("lora.learning_rate=2", "lora.learning_rate", "less than or equal to 1"),
        ("reft.positions=x1", "reft.positions", "positions must have the form f1, l1 or f1+l1"),
        ("reft.layers=[1,1]", "reft.layers", "layers must be unique"),
        ("max_lenght=3", "max_lenght", "there are model, stages"),
        ("max_length=3", "max_length", "greater than or equal to 16"),
        ("task.type=poem", "task.type", "'yes_no', 'choice' or 'text'"),
        ("task.metrics=f1", "task.metrics", "valid list"),
        ('task.metrics=["accuracy","f1"]', "task.metrics", "no task has all of"),
        ("early_stopping.patience=0", "early_stopping.patience", "greater than or equal to 1"),
        ("lara.rank=8", "lara.rank", "write it as lora.rank=8"),
        ("lora.rank", "lora.rank", "write it as"),
        ("seed=3", "seed", "write it as"),
        ("model=other", "model", "write it as"),
        ("task=text", "task", "write it as"),
    ],
)
def test_a_setting_at_fault_is_named(setting: str, param: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_from_settings("m", "heft", [setting], seed=0)
    assert refused.value.param == param
    assert refused.value.message.startswith(f"--set {param}")
    assert says in refused.value.message


def test_a_setting_of_a_stage_that_the_method_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="method lora has no reft stage") as refused:
        config_from_settings("m", "lora", ["lora.rank=2", "reft.rank=2"], seed=0)
    assert refused.value.param == "reft.rank"


def failed(result: tuple[int, list[Printed], str]) -> Printed:
    """The error of a command that failed: one event on stdout, the same on stderr, exit code 1."""
    code, events, err = result
    assert code == 1
    assert [event["code"] for event in events] == ["FAILED"]
    error: Printed = events[0]["data"]["error"]
    assert events[0]["level"] == "error"
    assert events[0]["message"] == error["message"]
    assert json.loads(err.splitlines()[-1]) == {"error": error}
    return error


def test_wrong_arguments_fail_with_their_names(
    tiny_llama_dir: Path, tmp_path: Path, command: Command
) -> None:
    good = write_rows(tmp_path / "train.jsonl", yes_no(4))
    bad = write_rows(tmp_path / "bad.jsonl", [*yes_no(2), {"question": "so", "answer": "perhaps"}])
    flags = {"--model": tiny_llama_dir, "--train": good, "--out": tmp_path / "out"}

    def outcome(*more: Any, **changes: Any) -> tuple[str, str | None, str]:
        options = {**flags, **{f"--{name}": value for name, value in changes.items()}}
        error = failed(command("train", *[x for pair in options.items() if pair[1] for x in pair], *more))
        return error["code"], error["param"], error["message"]

    assert outcome(model=None)[:2] == ("invalid_config", "model")
    assert outcome(out=None)[:2] == ("invalid_config", "out")
    assert outcome("--set", "lora.rank=0")[:2] == ("invalid_config", "lora.rank")
    assert outcome(model=tmp_path / "nowhere")[:2] == ("model_not_found", "model")
    assert outcome(train=tmp_path / "nowhere.jsonl") == (
        *("invalid_training_file", "training_file"),
        f"{tmp_path / 'nowhere.jsonl'} can't be read: No such file or directory",
    )
    code, param, message = outcome(train=bad)
    assert (code, param) == ("invalid_training_file", "answer")
    assert message.startswith("line 3: ")
    assert outcome(resume=tmp_path)[0] == "invalid_bundle"
    assert outcome(out=tmp_path)[:2] == ("invalid_config", "out")


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ("{", "run_file"),
        ("[]", "run_file"),
        (
            '{"config": {"model": "m", "stages": [{"type": "lora", "rank": 0}]}, "train": "t", "out": "o"}',
            None,
        ),
        ('{"config": {"model": "m", "stages": []}, "train": "t", "out": "o"}', "config.stages"),
        ('{"config": {"model": "m", "stages": [{"type": "lora"}]}, "out": "o"}', "train"),
        ('{"config": {"model": "m", "stages": [{"type": "lora"}]}, "train": "t", "out": "o", "x": 1}', "x"),
    ],
)
def test_a_bad_run_file_fails_with_its_field(
    tmp_path: Path, command: Command, content: str, param: str | None
) -> None:
    (tmp_path / "run.json").write_text(content)
    error = failed(command("train", "--run-file", tmp_path / "run.json"))
    assert error["code"] == "invalid_config"
    assert error["param"] == (param or "config.stages.0.lora.rank")


def test_a_run_file_may_not_name_a_free_path(tiny_llama_dir: Path, tmp_path: Path, command: Command) -> None:
    """The service writes run files from requests."""
    plan = {"train": str(write_rows(tmp_path / "t.jsonl", yes_no(4))), "out": str(tmp_path / "out")}
    plan["config"] = config(tiny_llama_dir).model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps(plan))
    error = failed(command("train", "--run-file", tmp_path / "run.json"))
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_a_known_dataset_is_checked_against_the_task(
    tiny_llama_dir: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task is checked before anything is downloaded; without a `task.type` the run takes the dataset's."""
    arguments = ("train", "--model", tiny_llama_dir, "--train", "hub:openai/gsm8k", "--out", tmp_path / "out")
    error = failed(command(*arguments, "--set", "task.type=choice"))
    assert error["param"] == "task.type"
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "2+2?", "completion": "no number"}])
    monkeypatch.setattr("heft_engine.preflight.prepare.write_reference", lambda *args: path)
    error = failed(command(*arguments))
    assert (error["code"], error["param"]) == ("invalid_training_file", "completion")
    assert "final_number" in error["message"]


def test_a_missing_run_file_or_bundle_is_reported(tmp_path: Path, command: Command) -> None:
    assert failed(command("train", "--run-file", tmp_path / "none.json"))["param"] == "run_file"
    code, printed, err = command("evaluate", "--bundle", tmp_path / "none", "--data", tmp_path / "none.jsonl")
    assert (code, printed) == (1, [])
    assert json.loads(err.splitlines()[-1])["error"]["code"] == "invalid_bundle"


def test_a_bad_line_is_named_by_predict(
    tiny_llama_dir: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(tiny_llama_dir, "lora", [but(LORA, n_epochs=1)]), tmp_path / "out")
    for line, says in (("{", "line 2 is not JSON"), ('{"question": 3}', "line 2: question must be a string")):
        monkeypatch.setattr("sys.stdin", io.StringIO('{"question": "so"}\n' + line + "\n"))
        code, _, err = command("predict", "--bundle", tmp_path / "out", "--device", "cpu")
        assert code == 1
        assert json.loads(err.splitlines()[-1])["error"]["message"].startswith(says)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(choice(1)[0] | text(1)[0])))
    assert command("predict", "--bundle", tmp_path / "out", "--device", "cpu")[0] == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_lack_of_memory_is_a_failure_with_advice(
    capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    with pytest.raises(EngineError, match="lower max_length") as raised, report_failures():
        raise error
    assert raised.value.code == "out_of_memory"
    assert json.loads(capfd.readouterr().out)["data"]["error"]["param"] == "max_length"


def test_a_bug_is_not_dressed_up_as_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="shapes"), report_failures():
        raise RuntimeError("shapes do not match")
    assert capfd.readouterr().out == ""
