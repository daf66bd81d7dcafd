"""Evaluation: a task's metrics on rows, alone and through a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import but, config, run
from engine_runs import parse as rows_of
from small_runs import reft

from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder
from heft_engine.data.task import Task
from heft_engine.errors import RowError
from heft_engine.evaluation import evaluate as evaluation_module
from heft_engine.evaluation.evaluate import Evaluation, evaluate
from heft_engine.evaluation.row_values import unpack_correctness, unpack_graded
from heft_engine.inference.detokenizer import decode
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, load_tokenizer, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.predictor import Predictor


def test_an_evaluation_reports_all_metrics_and_stores_the_rows_of_the_first() -> None:
    graded = Evaluation.of({"f1": [0.5, 1.0], "exact_match": [0.0, 1.0]})
    report = graded.to_json()
    assert (report["metric"], report["accuracy"], report["correct"]) == ("f1", 0.75, None)
    assert {name: metric["value"] for name, metric in report["metrics"].items()} == {
        "f1": 0.75,
        "exact_match": 0.5,
    }
    assert unpack_graded(graded.packed_rows()["values"], 2) == pytest.approx([0.5, 1.0], abs=1e-5)
    right = Evaluation.of({"exact_match": [0.0, 1.0], "f1": [0.5, 1.0]})
    assert right.correct == 1
    assert unpack_correctness(right.packed_rows()["right"], 2).tolist() == [False, True]


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"is it {n}", "completion": f" in the language\n#### {n}"} for n in range(count)]


def test_a_run_measures_by_the_metrics_of_its_task(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def generate(lm: Any, examples: Any, *, eos_tokens: Any, max_new_tokens: list[int], **rest: Any) -> Any:
        seen.append(max_new_tokens)
        # Right, the right number after another derivation, and wrong.
        texts = [sums(3)[0]["completion"], "#### 1", "#### 7"]
        return [encoder.continuation(text) for text in texts]

    def evaluated(lm: Any, coder: Any, *args: Any, **options: Any) -> Evaluation:
        nonlocal encoder
        encoder = coder
        return evaluate(lm, coder, *args, **options)

    encoder: Any = None
    monkeypatch.setattr(evaluation_module, "generate", generate)
    monkeypatch.setattr("heft_engine.training.result.evaluate", evaluated)
    task = TaskSettings(metrics=["f1", "final_number", "exact_match"])
    settings = config(tiny_llama_dir, "reft", [but(reft(), n_epochs=1)]).model_copy(update={"task": task})
    trained = run(settings, tmp_path / "out", rows_of(sums(8)), test_rows=rows_of(sums(3)))

    assert trained.bundle is not None
    assert trained.bundle.info.task["metrics"] == ["f1", "final_number", "exact_match"]
    record = trained.bundle.info.evaluation
    assert record is not None
    metrics = record["results"][-1]["metrics"]
    assert record["metric"] == "f1"
    assert metrics["final_number"]["value"] == pytest.approx(2 / 3)
    assert metrics["exact_match"]["value"] == pytest.approx(1 / 3)
    assert record["results"][-1]["accuracy"] == metrics["f1"]["value"]
    outcomes = trained.one("SUCCEEDED")["outcomes"]
    values = unpack_graded(outcomes["results"][-1]["values"], 3)
    assert values[0] == 1.0
    assert values.mean() == pytest.approx(metrics["f1"]["value"], abs=1e-5)
    # The budget of tokens is that of serving, whatever the length of the right answer.
    assert {budget for budgets in seen for budget in budgets} == {trained.bundle.info.max_new_tokens}


def test_generation_stops_when_an_exact_match_is_impossible(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric equals that of full generation, from fewer tokens."""
    generate, lengths, texts = evaluation_module.generate, [], []

    def counting(*args: Any, should_stop: Any, **options: Any) -> Any:
        short = generate(*args, should_stop=should_stop, **options)
        whole = generate(*args, **options)
        lengths.append((sum(map(len, short)), sum(map(len, whole))))
        texts.append([full[: len(cut)] == cut for full, cut in zip(whole, short, strict=True)])
        return short

    monkeypatch.setattr(evaluation_module, "generate", counting)
    settings = config(tiny_llama_dir, "reft", [but(reft(), n_epochs=1)])
    record = run(settings, tmp_path / "out", rows_of(sums(8)), test_rows=rows_of(sums(4)))
    assert record.bundle is not None
    assert all(all(same) for same in texts)
    assert all(short < whole / 2 for short, whole in lengths)


def test_evaluation_generates_what_serving_generates(tiny_llama_dir: Path) -> None:
    """Both stop at the token that ends a turn of a chat model, which is not the tokenizer's EOS token."""
    model = load_model(resolve_path(tiny_llama_dir), dtype=torch.float32, attention=IMPLEMENTATION)
    lm = PackedLM(model)
    task = Task.resolve(TaskSettings(metrics=["f1"]), "text")
    encoder = Encoder(load_tokenizer(tiny_llama_dir), task)
    row = rows_of([{"prompt": "all of what the sky is", "completion": " blue"}])[0]
    (example,) = encoder.encode(row)
    (whole,) = evaluation_module.generate(lm, [example], eos_tokens=(), max_new_tokens=[12])
    end = whole[-1]
    model.generation_config.eos_token_id = [end]
    (written,) = evaluation_module._generated(lm, encoder, [example], ["any"], 12)
    predictor = Predictor(ModelVariant(lm=lm), encoder, max_new_tokens=12)
    (served,) = predictor.predict([row])
    assert written == served.answer == decode(encoder.tokenizer, whole[: whole.index(end)])
    assert end != encoder.tokenizer.eos_token_id


def test_an_evaluation_has_wilsons_interval() -> None:
    # Wilson score, z = 1.96: the textbook's 8 of 10.
    result = Evaluation.of([True] * 8 + [False] * 2)
    assert (result.n, result.correct, result.accuracy) == (10, 8, 0.8)
    assert result.interval_95 == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Evaluation.of([True] * 5).interval_95[1] == 1.0


def test_an_answer_without_a_number_is_a_fault_of_its_row(tiny_llama_dir: Path, tmp_path: Path) -> None:
    task = TaskSettings(metrics=["final_number"])
    settings = config(tiny_llama_dir, "reft", [reft()]).model_copy(update={"task": task})
    with pytest.raises(RowError, match="needs a number in every answer") as refused:
        run(settings, tmp_path / "out", rows_of([*sums(2), {"prompt": "is it", "completion": " no"}]))
    assert refused.value.param == "completion"
