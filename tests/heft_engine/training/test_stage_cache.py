"""A stage that an equal run has trained is reused with the same weights; a damaged entry is a miss."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_command import Command, command, write_rows
from engine_runs import LORA, REFT, RunRecord, but, config, parse, run, tensors, yes_no

from heft_engine.bundle.format import read_bundle
from heft_engine.config.train import TrainConfig, recipe
from heft_engine.errors import Stopped
from heft_engine.model.base_models import resolve_path
from heft_engine.runtime.sealed_directory import seal, verify
from heft_engine.serving.predictor import load
from heft_engine.training import stage_cache
from heft_engine.training.setup import load as load_inputs
from heft_engine.training.stage_store import LocalStages

__all__ = ["command"]

TEST = parse(yes_no(10, seed=2))
VALIDATION = yes_no(6, seed=1)
OTHER_REFT = but(REFT, layers=[1], rank=3, learning_rate=5e-3)


@pytest.fixture
def store(tmp_path: Path) -> LocalStages:
    return LocalStages(directory=tmp_path / "store")


def same_model(actual: RunRecord, expected: RunRecord) -> None:
    """Checks that two runs have the same weights, bit for bit, and the same record."""
    mine, theirs = tensors(actual), tensors(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert actual.bundle is not None
    assert expected.bundle is not None
    assert actual.bundle.info == expected.bundle.info
    assert actual.bundle.probe == expected.bundle.probe


def trained_stages(record: RunRecord) -> list[int]:
    return sorted({metrics["stage_index"] for metrics in record.data("METRICS")})


def test_a_second_run_starts_at_its_own_second_stage(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    first = run(config(tiny_llama_dir), tmp_path / "first", test_rows=TEST, stage_store=store)
    assert trained_stages(first) == [0, 1]
    settings = config(tiny_llama_dir, stages=[LORA, OTHER_REFT])
    plain = run(settings, tmp_path / "plain", test_rows=TEST)
    torch.manual_seed(1_000)
    second = run(
        settings,
        tmp_path / "second",
        test_rows=TEST,
        stage_store=store,
        checkpoint_dir=tmp_path / "checkpoints",
    )
    assert trained_stages(second) == [1]
    assert second.losses == {step: loss for step, loss in plain.losses.items() if step > 6}
    same_model(second, plain)

    evaluations, expected = (
        [(data["stage"], data["correct"], data["interval_95"]) for data in record.data("EVALUATION")]
        for record in (second, plain)
    )
    assert evaluations == expected
    assert [data.get("step") for data in second.data("EVALUATION")] == [None, 6, None]
    reused = second.one("STAGE_REUSED")
    assert (reused["stage"], reused["stage_index"], reused["step"], reused["total_steps"]) == (
        "lora",
        0,
        6,
        12,
    )
    tokens = [stage["tokens"] for stage in plain.data("STAGE_COMPLETE")]
    assert second.one("SUCCEEDED")["trained_tokens"] == tokens[1], "what this run trained"


def test_the_end_of_a_reused_stage_is_a_model_and_a_checkpoint_of_this_run(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    run(config(tiny_llama_dir, "lora"), tmp_path / "first", test_rows=TEST, stage_store=store)
    copy = shutil.copytree(tiny_llama_dir, tmp_path / "another-place")
    settings = config(copy, "heft")
    folder = tmp_path / "checkpoints"
    second = run(settings, tmp_path / "second", test_rows=TEST, stage_store=store, checkpoint_dir=folder)
    ends = [data for data in second.data("CHECKPOINT_SAVED") if data["kind"] == "stage"]
    assert [(end["stage"], end["step"], "key" in end) for end in ends] == [
        ("lora", 6, False),
        ("reft", 12, True),
    ]
    path = Path(ends[0]["path"])
    verify(path)
    bundle = read_bundle(path / "bundle")
    assert bundle.info.method == "heft"
    assert bundle.info.base_model.reference == str(copy)
    assert second.bundle is not None
    for written in (bundle.path, second.bundle.path):
        adapter = json.loads((written / "lora" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(copy)
    answers = load(path / "bundle", device="cpu").predict(TEST)
    right = sum(answer.answer == row.answer for answer, row in zip(answers, TEST, strict=True))
    assert right == second.data("EVALUATION")[1]["correct"]

    again = run(settings, tmp_path / "again", test_rows=TEST, resume=path)
    assert trained_stages(again) == [1]
    same_model(again, second)


def test_a_run_that_is_all_there_trains_nothing(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    first = run(config(tiny_llama_dir), tmp_path / "first", stage_store=store)
    second = run(config(tiny_llama_dir), tmp_path / "second", stage_store=store)
    assert second.losses == {}
    assert [data["stage"] for data in second.data("STAGE_REUSED")] == ["lora", "reft"]
    assert second.one("SUCCEEDED")["trained_tokens"] == 0
    same_model(second, first)
    answers = load(tmp_path / "second", device="cpu").predict(TEST)
    assert answers == load(tmp_path / "first", device="cpu").predict(TEST)


def test_a_run_that_is_all_there_has_its_validation_result_too(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    """No scores of validation rows are stored: they are scored again."""
    rows = {"validation": parse(VALIDATION), "test_rows": TEST, "stage_store": store}
    first = run(config(tiny_llama_dir, "lora"), tmp_path / "first", **rows)
    second = run(config(tiny_llama_dir, "lora"), tmp_path / "second", **rows)
    assert second.losses == {}
    outcomes = second.one("SUCCEEDED")["outcomes"]
    assert outcomes["validation"]["n"] == len(VALIDATION)
    assert outcomes == first.one("SUCCEEDED")["outcomes"]


def test_the_longest_prefix_counts_and_every_stage_of_it_ends(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    """The second ReFT stage trains the first one's intervention further: each stage's end has its own state."""
    method: Any = "heft_interleaved"
    lora, first_reft, *_ = recipe(method, LORA, REFT)
    run(config(tiny_llama_dir, method), tmp_path / "first", TEST, stage_store=store)
    settings = config(tiny_llama_dir, stages=[lora, first_reft, lora, but(REFT, n_epochs=1)])
    plain = run(settings, tmp_path / "plain", TEST, checkpoint_dir=tmp_path / "plain-checkpoints")
    second = run(
        settings, tmp_path / "second", TEST, stage_store=store, checkpoint_dir=tmp_path / "checkpoints"
    )
    assert trained_stages(second) == [3]
    same_model(second, plain)
    ends = [data["path"] for data in second.data("CHECKPOINT_SAVED") if data["kind"] == "stage"]
    others = [data["path"] for data in plain.data("CHECKPOINT_SAVED") if data["kind"] == "stage"]
    for mine, theirs in zip(ends, others, strict=True):
        bundle, expected = read_bundle(Path(mine) / "bundle"), read_bundle(Path(theirs) / "bundle")
        same_model(RunRecord(bundle=bundle), RunRecord(bundle=expected))


# -- what may go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["state.json", "bundle/lora/adapter_model.safetensors", "bundle/heft.json"])
def test_a_damaged_entry_is_a_miss_and_makes_place_for_a_whole_one(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages, file: str
) -> None:
    settings = config(tiny_llama_dir, "lora")
    first = run(settings, tmp_path / "first", stage_store=store)
    (entry,) = store.directory.iterdir()
    content = bytearray((entry / file).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / file).write_bytes(content)
    second = run(settings, tmp_path / "second", stage_store=store)
    assert second.losses == first.losses
    same_model(second, first)
    third = run(settings, tmp_path / "third", stage_store=store)
    assert third.losses == {}
    same_model(third, first)


def test_an_entry_under_another_s_key_is_a_miss(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    run(config(tiny_llama_dir, "lora"), tmp_path / "first", stage_store=store)
    (entry,) = store.directory.iterdir()
    settings = config(tiny_llama_dir, "lora", seed=1)
    plain = run(settings, tmp_path / "plain")
    inputs = load_inputs(settings, resolve_path(tiny_llama_dir), parse(yes_no(24)), [], [], "cpu")
    (key,) = stage_cache.stage_keys(inputs)
    entry.rename(store.directory / key)
    second = run(settings, tmp_path / "second", stage_store=store)
    assert second.losses == plain.losses
    same_model(second, plain)


def test_an_entry_that_is_whole_and_can_t_be_read_is_a_miss(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    settings = config(tiny_llama_dir, "lora")
    run(settings, tmp_path / "first", stage_store=store)
    (entry,) = store.directory.iterdir()
    (entry / "bundle" / "heft.json").write_text("{}")
    seal(entry)
    assert trained_stages(run(settings, tmp_path / "second", stage_store=store)) == [0]


def test_a_store_that_takes_nothing_is_no_reason_to_fail(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in its place")
    store = LocalStages(directory=tmp_path / "file" / "stages")
    record = run(config(tiny_llama_dir, "lora"), tmp_path / "out", stage_store=store)
    assert record.bundle is not None
    assert "stage_not_kept" in [data["signature"] for data in record.data("WARNING")]


def test_without_a_store_nothing_is_looked_up_or_kept(
    tiny_llama_dir: Path, tmp_path: Path, command: Command
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", yes_no(12))

    def train(name: str, *flags: str) -> list[str]:
        required = ("--model", tiny_llama_dir, "--train", rows, "--out", tmp_path / name, "--device", "cpu")
        more = ("--method", "lora", "--set", "lora.n_epochs=1", "--cache-dir", tmp_path / "cache")
        code, events, _ = command("train", *required, *more, *flags)
        assert code == 0
        return [event["code"] for event in events]

    stages = tmp_path / "cache" / "stages"
    assert "METRICS" in train("no", "--no-reuse")
    assert not stages.exists()
    assert "METRICS" in train("first")
    assert len(list(stages.iterdir())) == 1
    assert "METRICS" in train("no-again", "--no-reuse")
    second = train("second")
    assert "STAGE_REUSED" in second
    assert "METRICS" not in second


# -- runs that are interrupted ---------------------------------------------------------------------------------------


def stopped(settings: TrainConfig, folder: Path, at: int, **options: Any) -> RunRecord:
    """Runs until this call of `should_stop`; its checkpoints are in `folder`."""
    record, calls = RunRecord(), itertools.count(1)
    with pytest.raises(Stopped):
        run(
            settings,
            folder / "out",
            record=record,
            checkpoint_dir=folder,
            should_stop=lambda: next(calls) == at,
            **options,
        )
    return record


def newest(record: RunRecord) -> Path:
    return Path(record.data("CHECKPOINT_SAVED")[-1]["path"])


def test_a_run_that_reused_a_stage_is_stopped_and_goes_on(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    run(config(tiny_llama_dir, "lora"), tmp_path / "first", stage_store=store)
    settings = config(tiny_llama_dir)
    plain = run(settings, tmp_path / "plain")
    before = stopped(settings, tmp_path / "stopped", 3, stage_store=store)
    assert list(before.losses) == [7, 8, 9]
    resumed = run(settings, tmp_path / "after", resume=newest(before), stage_store=store)
    assert resumed.data("STAGE_REUSED") == []
    assert before.losses | resumed.losses == {step: loss for step, loss in plain.losses.items() if step > 6}
    same_model(resumed, plain)
    trained = [stage["tokens"] for stage in plain.data("STAGE_COMPLETE")]
    assert resumed.one("SUCCEEDED")["trained_tokens"] == trained[1]


def test_a_run_that_went_on_keeps_what_it_ends_with(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages
) -> None:
    settings = config(tiny_llama_dir, "lora")
    before = stopped(settings, tmp_path / "stopped", 2, stage_store=store)
    run(settings, tmp_path / "after", resume=newest(before), stage_store=store)
    assert run(settings, tmp_path / "second", stage_store=store).losses == {}


@pytest.mark.parametrize("other", ["test rows", "code"])
def test_a_run_that_went_on_with_something_else_keeps_nothing(
    tiny_llama_dir: Path, tmp_path: Path, store: LocalStages, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint resumes after an upgrade; its result belongs to neither the old version nor the new one."""
    settings = config(tiny_llama_dir, "lora")
    before = stopped(settings, tmp_path / "stopped", 2, stage_store=store, test_rows=TEST)
    if other == "code":
        monkeypatch.setattr(stage_cache, "code_hash", lambda: "newer")
    test = TEST if other == "code" else TEST[1:]
    record = run(settings, tmp_path / "after", resume=newest(before), stage_store=store, test_rows=test)
    assert record.bundle is not None
    assert not store.directory.exists()
