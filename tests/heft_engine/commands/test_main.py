"""`python -m heft_engine train|evaluate|predict`, in this process: output and exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from engine_command import Command, command, write_rows
from engine_runs import LORA, REFT, ROWS, but, config, parse, run, yes_no

from heft_engine.serving.predictor import load

__all__ = ["command"]

QUICK = ["--set", "lora.n_epochs=1", "--set", "reft.n_epochs=1", "--set", "dtype=float32", "--device", "cpu"]


@pytest.mark.parametrize("kind", ROWS)
def test_train_then_evaluate_then_predict(
    tiny_llama_dir: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    train, test = (write_rows(tmp_path / f"{n}.jsonl", ROWS[kind](n, seed=n)) for n in (12, 9))
    out = tmp_path / "out"
    flags = ["--model", tiny_llama_dir, "--train", train, "--test", test, "--out", out]
    code, events, _ = command("train", *flags, *QUICK, "--seed", 3)
    assert code == 0
    assert (events[0]["code"], events[-1]["code"]) == ("STARTED", "SUCCEEDED")
    assert {"code", "type", "level", "message", "data", "time"} == set(events[0])
    last = events[-1]["data"]["evaluation"]["results"][-1]

    code, printed, _ = command("evaluate", "--bundle", out, "--data", test, "--device", "cpu")
    assert code == 0
    assert {name: printed[0][name] for name in ("accuracy", "correct", "interval_95")} == {
        name: last[name] for name in ("accuracy", "correct", "interval_95")
    }
    assert printed[0]["n"] == 9

    monkeypatch.setattr("sys.stdin", io.StringIO(test.read_text() + "\n"))
    code, answers, _ = command("predict", "--bundle", out, "--device", "cpu")
    assert code == 0
    mine = load(out, device="cpu").predict(parse(ROWS[kind](9, seed=9)))
    assert [answer["answer"] for answer in answers] == [prediction.answer for prediction in mine]
    assert [answer["label_probabilities"] for answer in answers] == [p.label_probabilities for p in mine]


def test_the_command_and_the_library_have_the_same_losses(
    tiny_llama_dir: Path, tmp_path: Path, command: Command
) -> None:
    train = write_rows(tmp_path / "train.jsonl", yes_no(24))
    stages = [but(LORA, batch_size=16, n_epochs=1), but(REFT, n_epochs=1, layers=[1], rank=3)]
    library = run(config(tiny_llama_dir, "heft", stages, seed=5), tmp_path / "library")
    sets = ["lora.learning_rate=5e-3", "lora.n_epochs=1", "reft.batch_size=8", "reft.layers=1", "reft.rank=3"]
    sets += ["reft.learning_rate=0.01", "reft.n_epochs=1", "dtype=float32"]
    settings = [part for setting in sets for part in ("--set", setting)]
    flags = [
        "--model",
        tiny_llama_dir,
        "--train",
        train,
        "--out",
        tmp_path / "out",
        "--seed",
        5,
        "--device",
        "cpu",
    ]
    _, by_flags, _ = command("train", *flags, *settings)
    plan = {
        "config": config(tiny_llama_dir, "heft", stages, seed=5).model_dump(mode="json"),
        "train": str(train),
        "out": str(tmp_path / "by-file"),
        "device": "cpu",
        "allow_paths": True,
    }
    (tmp_path / "run.json").write_text(json.dumps(plan))
    _, by_file, _ = command("train", "--run-file", tmp_path / "run.json")
    for events in (by_flags, by_file):
        losses = {e["data"]["step"]: e["data"]["loss"] for e in events if e["code"] == "METRICS"}
        assert losses == library.losses
