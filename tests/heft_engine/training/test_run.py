"""Whole runs: every method on every task, the order of its events, and its bundle."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from engine_runs import LORA, REFT, ROWS, but, config, parse, run
from safetensors.torch import load_file, save_file

from heft_engine.config.train import MethodType, TaskSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import parse_row
from heft_engine.evaluation.evaluate import Evaluation, evaluate
from heft_engine.inference.greedy import generate
from heft_engine.inference.scoring import score
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.predictor import load
from heft_engine.training import result

QUICK = {"n_epochs": 1, "batch_size": 6}
#: Four stages: an intervention, trained further by the third stage, and adapters of different layers.
FOUR = [but(REFT, layers=[0]), LORA, but(REFT, layers=[0], n_epochs=1), but(LORA, layers=[3])]
STAGES = {
    "heft": [LORA, REFT],
    "lora": [LORA],
    "reft": [REFT],
    "heft_reversed": [REFT, LORA],
    "heft_interleaved": [LORA, REFT, LORA, REFT],
    "recipe": FOUR,
}


def computed(lm: PackedLM, encoder: Encoder, examples: list[Example]) -> list[Any]:
    """Returns each row's scores, and its tokens where the task generates them."""
    scores: list[Any] = [(row_scores.totals, row_scores.means) for row_scores in score(lm, examples)]
    if encoder.task.type != "text":
        return scores
    eos = encoder.tokenizer.eos_token_id
    tokens = generate(lm, examples, eos_tokens={eos}, max_new_tokens=[8] * len(examples))
    return list(zip(scores, tokens, strict=True))


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("method", STAGES)
def test_every_method_trains_every_task_and_its_bundle_answers_with_the_same_bits(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    evaluated: list[Any] = []

    def recording(lm: PackedLM, encoder: Encoder, examples: list[Example], **options: int) -> Evaluation:
        evaluated.append(computed(lm, encoder, examples))
        return evaluate(lm, encoder, examples, **options)

    monkeypatch.setattr(result, "evaluate", recording)
    rows, test = parse(ROWS[kind](12)), parse(ROWS[kind](9, seed=2))
    stages = [but(stage, **QUICK) for stage in STAGES[method]]
    method = method if method in get_args(MethodType) else "recipe"
    record = run(config(tiny_llama_dir, method, stages), tmp_path / "out", rows, test_rows=test)

    assert record.bundle is not None
    assert record.bundle.info.method == method
    assert [stage["type"] for stage in record.bundle.info.stages] == [stage.type for stage in stages]
    assert len(evaluated) == len(stages) + 1
    assert all(answers_before != answers_after for answers_before, answers_after in pairwise(evaluated)), (
        "each stage moves the answers"
    )
    predictor = load(tmp_path / "out", device="cpu")
    examples = [example for row in test for example in predictor.encoder.encode(row)]
    assert computed(predictor.lm, predictor.encoder, examples) == evaluated[-1]
    alone = [computed(predictor.lm, predictor.encoder, [example])[0] for example in examples]
    assert alone == evaluated[-1]
    if kind != "text":
        answers = [prediction.answer for prediction in predictor.predict(test)]
        right = sum(a == row.answer for a, row in zip(answers, test, strict=True))
        assert right == record.data("EVALUATION")[-1]["correct"]


def test_a_label_that_begins_with_anothers_tokens_can_be_learned(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    # Larger logits: the sums of log-probabilities of a flat model's answers go by their lengths alone.
    weights["model.norm.weight"] *= 20
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    labels = ["name", "name of the list"]
    rows = [
        {"question": "what is it", "passage": passage, "answer": label}
        for passage, label in zip(("river", "stone"), labels, strict=True)
    ]
    task = TaskSettings(type="choice", labels=labels)
    stage = but(LORA, n_epochs=12, batch_size=4, learning_rate=1e-2)
    parsed = [parse_row(row, labels=labels) for row in rows]
    run(config(base, "lora", [stage], task=task), tmp_path / "out", parsed * 8)
    predictor = load(tmp_path / "out", device="cpu")
    assert [prediction.answer for prediction in predictor.predict(parsed)] == labels


def test_rows_with_empty_prompts_are_learned(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The prompt has two tokens, and the intervention acts on them."""
    rows = parse([{"prompt": "", "completion": "river"}] * 8)
    stages = [but(LORA, n_epochs=1), but(REFT, positions="f1+l1", n_epochs=8)]
    losses = run(config(tiny_llama_dir, "recipe", stages), tmp_path / "out", rows).losses
    assert losses[9] < losses[2], "the intervention learns"
    assert load(tmp_path / "out", device="cpu").predict(rows[:1])[0].answer is not None


def test_events_come_in_order_with_their_stage(tiny_llama_dir: Path, tmp_path: Path) -> None:
    record = run(
        config(tiny_llama_dir, "heft"),
        tmp_path / "out",
        None,
        parse(ROWS["yes_no"](8, seed=1)),
        checkpoint_dir=tmp_path / "checkpoints",
    )
    epoch = ["METRICS"] * 3 + ["EPOCH_COMPLETE", "CHECKPOINT_SAVED"]
    end = ["EVALUATION", "STAGE_COMPLETE", "CHECKPOINT_SAVED"]
    assert [event.code for event in record.events if event.code not in ("WARNING", "WORKING")] == [
        *("STARTED", "EVALUATION"),
        *("STAGE_STARTED", *epoch * 2, "MERGE_VERIFIED", *end),
        *("STAGE_STARTED", *epoch * 2, *end),
        "SUCCEEDED",
    ]
    stage = None
    for event in record.events:
        event.to_json()
        if event.code == "STAGE_STARTED":
            stage = (event.data["stage"], event.data["stage_index"])
        if stage and event.code not in ("SUCCEEDED",):
            assert (event.data["stage"], event.data["stage_index"]) == stage
    assert [s["stage"] for s in record.data("STAGE_STARTED")] == ["lora", "reft"]
    assert [e["stage"] for e in record.data("EVALUATION")] == ["base", "lora", "reft"]


def test_what_is_announced_is_what_happens(tiny_llama_dir: Path, tmp_path: Path) -> None:
    record = run(config(tiny_llama_dir, "heft", [LORA, but(REFT, learning_rate="auto")]), tmp_path / "out")
    started, succeeded = record.one("STARTED"), record.one("SUCCEEDED")
    lora, reft = started["resolved"]["stages"]
    assert (lora["target_modules"], reft["layers"]) == (["q_proj", "v_proj"], [2])
    assert 1e-3 < reft["learning_rate"] <= 2e-2
    assert max(m["learning_rate"] for m in record.data("METRICS")[6:]) <= reft["learning_rate"]
    assert started["total_steps"] == len(record.data("METRICS")) == 12
    assert started["rows"] == 24
    assert (started["resolved"]["dtype"], started["resolved"]["device"]) == ("float32", "cpu")
    assert succeeded["trained_tokens"] == sum(s["tokens"] for s in record.data("STAGE_COMPLETE"))
    # LoRA: (32·8 + 8·32 + 32·8 + 8·16) of four layers; LoReFT: the raw R, W and b.
    trained = [s["trained_parameters"] for s in record.data("STAGE_STARTED")]
    assert trained == [4 * 896, 32 * 2 + 32 * 2 + 2]
    assert succeeded["bundle"] == str(tmp_path / "out")
    assert succeeded["parity"]["merges"] == [
        {name: value for name, value in record.one("MERGE_VERIFIED").items() if name != "stage"}
    ]


def test_evaluation_is_on_test_rows_else_on_validation_rows_else_not(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    validation, test = parse(ROWS["yes_no"](8, seed=1)), parse(ROWS["yes_no"](9, seed=2))
    settings = config(tiny_llama_dir, "lora", [but(LORA, **QUICK)])
    both = run(settings, tmp_path / "both", None, validation, test_rows=test).one("SUCCEEDED")["evaluation"]
    validation_only = run(settings, tmp_path / "one", None, validation).one("SUCCEEDED")["evaluation"]
    none = run(settings, tmp_path / "none")
    assert (both["n"], both["split"], both["held_out"]) == (9, "test", True)
    assert (validation_only["n"], validation_only["split"], validation_only["held_out"]) == (
        8,
        "validation",
        False,
    )
    assert [evaluation["stage"] for evaluation in both["results"]] == ["base", "lora"]
    assert len(both["general_loss"]) == 2
    for evaluation in both["results"]:
        low, high = evaluation["interval_95"]
        assert 0 <= low <= evaluation["accuracy"] == evaluation["correct"] / 9 <= high <= 1
    assert none.one("SUCCEEDED")["evaluation"] is None
    assert none.data("EVALUATION") == []


def test_a_shared_label_task_with_a_template_of_its_own(tiny_llama_dir: Path, tmp_path: Path) -> None:
    labels = ["good", "bad"]
    objects = [{"question": f"film {i}", "answer": labels[i % 2]} for i in range(8)]
    rows = [parse_row(row, labels=labels) for row in objects]
    task = TaskSettings(labels=labels, template="{question} It is")
    run(config(tiny_llama_dir, "lora", [but(LORA, **QUICK)], task=task), tmp_path / "out", rows)
    predictor = load(tmp_path / "out", device="cpu")
    assert predictor.encoder.tokenizer.decode(predictor.encoder.question(rows[0]).prompt) == "film 0? It is"
    (prediction,) = predictor.predict(rows[:1])
    assert prediction.label_probabilities is not None
    assert set(prediction.label_probabilities) == set(labels)
    assert sum(prediction.label_probabilities.values()) == pytest.approx(1)
    assert prediction.probability == max(prediction.label_probabilities.values())
