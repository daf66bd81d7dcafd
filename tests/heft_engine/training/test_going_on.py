"""A run that goes on from a fine-tuned model: its weights, what it inherits and refuses, the bundle that it writes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_command import write_rows
from engine_runs import (
    LORA,
    REFT,
    VARIANTS,
    RunRecord,
    assert_equal,
    but,
    config,
    interrupted,
    parse,
    run,
    tensors,
    yes_no,
)

from heft_engine.bundle.export import export
from heft_engine.bundle.format import Ancestor, read_bundle
from heft_engine.commands.train_process import train_in_process
from heft_engine.config.run_file import RunFile
from heft_engine.config.train import Stage, TaskSettings, TrainConfig
from heft_engine.errors import BundleError, ConfigError
from heft_engine.serving.predictor import load
from heft_engine.training.stage_store import LocalStages

VALIDATION = parse(yes_no(16, seed=1))
FIRST, SECOND = but(LORA, n_epochs=1), but(REFT, n_epochs=1)
DORA = but(VARIANTS[1], n_epochs=1)
#: The stages of the first run, and of the one that goes on from its model.
CASES: dict[str, tuple[list[Stage], list[Stage]]] = {
    "lora, lora": ([FIRST], [but(FIRST, rank=3)]),
    "lora, dora": ([FIRST], [DORA]),
    "lora, reft": ([FIRST], [SECOND]),
    "reft, lora": ([SECOND], [FIRST]),
    "the same reft": ([SECOND], [SECOND]),
    "another reft": ([SECOND], [but(SECOND, rank=3, layers=[0, 2])]),
    "a new reft": ([SECOND], [but(SECOND, init="new")]),
    "heft, heft": ([FIRST, SECOND], [FIRST, SECOND]),
}


def going_on(start: Path, stages: list[Stage], **settings: Any) -> TrainConfig:
    return config(start, "recipe", stages, **settings)


@pytest.mark.parametrize("case", CASES)
def test_two_runs_train_what_one_run_of_all_stages_would(
    tiny_llama_dir: Path, tmp_path: Path, case: str
) -> None:
    before, after = CASES[case]
    whole = run(config(tiny_llama_dir, "recipe", [*before, *after]), tmp_path / "whole", None, VALIDATION)
    first = run(config(tiny_llama_dir, "recipe", before), tmp_path / "first", None, VALIDATION)
    second = run(going_on(tmp_path / "first", after), tmp_path / "second", None, VALIDATION)
    same_model(second, whole)
    assert list(second.losses.values()) == list(whole.losses.values())[len(first.losses) :]
    steps = [metrics["step"] for metrics in second.data("METRICS")]
    assert steps == list(range(1, second.one("STARTED")["total_steps"] + 1)), "its own steps are counted"

    correct = [evaluation["correct"] for evaluation in whole.data("EVALUATION")]
    evaluations = second.data("EVALUATION")
    assert [evaluation["correct"] for evaluation in evaluations] == correct[len(before) :]
    assert [(each["stage"], each["stage_index"]) for each in evaluations] == [
        ("start", None),
        *((stage.type, index) for index, stage in enumerate(after)),
    ]
    served_as_trained(second)


def same_model(second: RunRecord, whole: RunRecord) -> None:
    """Checks that the last of two runs has the weights, stages and probe scores of a single run, bit for bit."""
    mine, theirs = tensors(second), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert second.bundle is not None
    assert whole.bundle is not None
    info, expected = second.bundle.info, whole.bundle.info
    assert (info.stages, info.parity) == (expected.stages, expected.parity)
    assert (info.base_model, info.task, info.dtype) == (expected.base_model, expected.task, expected.dtype)
    assert second.bundle.probe == whole.bundle.probe


def served_as_trained(record: RunRecord) -> None:
    """Checks the answers of the bundle, which loading has compared with the scores of training."""
    assert record.bundle is not None
    answers = load(record.bundle.path, device="cpu").predict(VALIDATION)
    correct = sum(answer.answer == row.answer for answer, row in zip(answers, VALIDATION, strict=True))
    assert correct == record.data("EVALUATION")[-1]["correct"]


def test_going_on_three_times_leaves_bundles_that_need_no_other(tiny_llama_dir: Path, tmp_path: Path) -> None:
    stages: list[list[Stage]] = [[FIRST], [SECOND], [FIRST, but(SECOND, rank=3)]]
    models, seeds = [tiny_llama_dir], [5, 6, 7]
    for number, (stage, seed) in enumerate(zip(stages, seeds, strict=True)):
        settings = config(models[-1], "recipe", stage, seed=seed)
        record = run(settings, tmp_path / f"model-{number}", None, VALIDATION)
        models.append(tmp_path / f"model-{number}")
    for earlier in models[1:-1]:
        shutil.rmtree(earlier)

    bundle = read_bundle(models[-1])
    info = bundle.info
    assert [stage["type"] for stage in info.stages] == ["lora", "reft", "lora", "reft"]
    assert info.base_model.reference == str(tiny_llama_dir)
    assert [record["stage_index"] for record in info.parity] == [0, 2]
    assert [merge["stage_index"] for merge in record.one("SUCCEEDED")["parity"]["merges"]] == [0]
    ancestry = [(ancestor.model, ancestor.stages, ancestor.seed) for ancestor in info.started_from]
    assert ancestry == [(str(models[1]), 1, 5), (str(models[2]), 2, 6)]
    assert len({ancestor.sha256 for ancestor in info.started_from}) == 2
    served_as_trained(record)

    export(bundle.path, "peft", tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    export(bundle.path, "pyreft", tmp_path / "pyreft")
    export(bundle.path, "merged", tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("reft*"))) == 2


@pytest.mark.parametrize("case", ["heft, heft", "a new reft"])
def test_stopped_and_resumed_is_never_stopped(tiny_llama_dir: Path, tmp_path: Path, case: str) -> None:
    before, after = CASES[case]
    run(config(tiny_llama_dir, "recipe", before), tmp_path / "first")
    settings = going_on(tmp_path / "first", after)
    whole = run(settings, tmp_path / "whole", None, VALIDATION)
    calls = len(whole.losses) + len(after)
    losses, last = interrupted(settings, tmp_path / "parts", list(range(2, calls, 2)), VALIDATION)
    assert losses == whole.losses
    assert_equal(last, whole)


def test_a_checkpoint_belongs_to_the_model_that_its_run_started_from(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    run(config(tiny_llama_dir, "recipe", [FIRST]), start)
    settings = going_on(start, [SECOND])
    run(settings, tmp_path / "second", checkpoint_dir=tmp_path / "checkpoints")
    (end,) = (tmp_path / "checkpoints").glob("*-stage")
    shutil.rmtree(start)
    run(config(tiny_llama_dir, "recipe", [FIRST], seed=1), start)
    with pytest.raises(BundleError, match="started from another model"):
        run(settings, tmp_path / "third", resume=end)


def test_an_epoch_s_checkpoint_holds_the_stages_before(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run(config(tiny_llama_dir, "recipe", [FIRST]), tmp_path / "first")
    settings = going_on(tmp_path / "first", [but(LORA, n_epochs=2)])
    run(settings, tmp_path / "second", checkpoint_dir=tmp_path / "checkpoints", n_checkpoints=1)
    (epoch,) = (tmp_path / "checkpoints").glob("*-epoch")
    bundle = read_bundle(epoch / "bundle")
    assert len(bundle.adapters) == 2
    assert len(bundle.info.started_from) == 1
    load(epoch / "bundle", device="cpu")


def test_stages_are_reused_by_the_content_of_the_model_started_from(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    store = LocalStages(directory=tmp_path / "store")
    first = run(config(tiny_llama_dir, "recipe", [FIRST]), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    run(config(tiny_llama_dir, "recipe", [FIRST], seed=1), tmp_path / "other")

    def second(start: str) -> RunRecord:
        settings = going_on(tmp_path / start, [FIRST, SECOND])
        return run(settings, tmp_path / f"from-{start}", None, VALIDATION, stage_store=store)

    plain = second("first")
    reused = second("copy")
    assert len(reused.data("STAGE_REUSED")) == 2
    assert len(first.losses) > 0
    assert not reused.losses
    same_model(reused, plain)
    assert reused.bundle is not None
    assert [ancestor.model for ancestor in reused.bundle.info.started_from] == [str(tmp_path / "copy")]
    assert not second("other").data("STAGE_REUSED")
    from_base = run(config(tiny_llama_dir, "recipe", [FIRST, SECOND]), tmp_path / "base", stage_store=store)
    assert not from_base.data("STAGE_REUSED")


def test_a_quantised_base_stays_quantised(tiny_llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    both = config(tiny_llama_dir, "recipe", [FIRST, SECOND], base_quantization="nf4")
    whole = run(both, tmp_path / "whole", None, VALIDATION)
    run(both.model_copy(update={"stages": [FIRST]}), tmp_path / "first", None, VALIDATION)
    second = run(going_on(tmp_path / "first", [SECOND]), tmp_path / "second", None, VALIDATION)
    same_model(second, whole)
    assert second.bundle is not None
    assert second.bundle.info.base_quantization == "nf4"
    assert second.one("STARTED")["resolved"]["base_quantization"] == "nf4"
    served_as_trained(second)


def test_settings_are_inherited(tiny_llama_dir: Path, tmp_path: Path) -> None:
    task = TaskSettings(template="{passage} {question}?", metrics=["accuracy"])
    run(config(tiny_llama_dir, "recipe", [FIRST], task=task, max_length=64), tmp_path / "first")
    settings = going_on(tmp_path / "first", [SECOND], dtype="auto")
    second = run(settings, tmp_path / "second").one("STARTED")["resolved"]
    assert (second["task"]["template"], second["max_length"], second["dtype"]) == (
        "{passage} {question}?",
        64,
        "float32",
    )
    own = going_on(tmp_path / "first", [SECOND], task=TaskSettings(template="{question}"), max_length=32)
    third = run(own, tmp_path / "third").one("STARTED")["resolved"]
    assert (third["task"]["template"], third["max_length"]) == ("{question}", 32)


def test_another_task_may_follow(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run(config(tiny_llama_dir, "recipe", [FIRST]), tmp_path / "first")
    rows = parse([{"prompt": f"Say {word}:", "completion": word} for word in ("sea", "stone", "name")])
    second = run(going_on(tmp_path / "first", [SECOND]), tmp_path / "second", rows)
    assert second.bundle is not None
    assert second.bundle.info.task["type"] == "text"
    assert second.bundle.info.task["template"] == "{prompt}"


def test_labels_of_rows_are_inherited_before_the_rows_are_read(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = [{"question": f"what is {n}", "answer": "sea" if n % 2 else "stone"} for n in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    first = RunFile(
        config=config(tiny_llama_dir, "recipe", [FIRST], task=TaskSettings(labels=["sea", "stone"])),
        train=path,
        out=tmp_path / "first",
        device="cpu",
        allow_paths=True,
    )
    train_in_process(first, threading.Event())
    second = {"config": going_on(tmp_path / "first", [SECOND]), "out": tmp_path / "second"}
    train_in_process(first.model_copy(update=second), threading.Event())
    assert read_bundle(tmp_path / "second").info.task["labels"] == ["sea", "stone"]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"base_quantization": "nf4"}, "base_quantization"),
        ({"task": TaskSettings(type="text")}, "task.type"),
    ],
)
def test_settings_that_the_model_does_not_allow_are_named(
    tiny_llama_dir: Path, tmp_path: Path, settings: dict[str, Any], param: str
) -> None:
    run(config(tiny_llama_dir, "recipe", [SECOND]), tmp_path / "first")
    with pytest.raises(ConfigError) as error:
        run(going_on(tmp_path / "first", [SECOND], **settings), tmp_path / "second")
    assert error.value.param == param


def test_a_base_with_other_weights_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    run(config(base, "recipe", [SECOND]), tmp_path / "first")
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="its weights differ"):
        run(going_on(tmp_path / "first", [SECOND]), tmp_path / "second")


def test_a_base_with_another_chat_template_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    run(config(base, "recipe", [SECOND]), tmp_path / "first")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(BundleError, match="tokenizer is not the one"):
        run(going_on(tmp_path / "first", [SECOND]), tmp_path / "second")


def test_an_ancestor_has_the_content_of_its_bundle(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The hash is of trained tensors and settings: neither the folder's name nor the evaluation counts."""
    for name, rows in (("first", VALIDATION), ("again", ())):
        run(config(tiny_llama_dir, "recipe", [SECOND]), tmp_path / name, None, rows)
        run(going_on(tmp_path / name, [FIRST]), tmp_path / f"from-{name}")
    (first,), (again,) = (
        read_bundle(tmp_path / f"from-{name}").info.started_from for name in ("first", "again")
    )
    assert again == Ancestor(**{**first.model_dump(), "model": str(tmp_path / "again")})
