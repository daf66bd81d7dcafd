"""Metrics of written answers: by hand, against their library, and through an evaluation."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import but, config, run
from engine_runs import parse as rows_of
from pydantic import ValidationError
from small_runs import reft
from torchmetrics.functional.text import rouge_score, squad

from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder
from heft_engine.data.metrics import final_number, measure
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError, RowError
from heft_engine.evaluation import evaluate as evaluation_module
from heft_engine.evaluation.evaluate import Evaluation, evaluate
from heft_engine.evaluation.row_values import mean_interval, pack_graded, unpack_correctness, unpack_graded
from heft_engine.inference.detokenizer import decode
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, load_tokenizer, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.predictor import Predictor

SENTENCES = [
    ("the cat sat on the mat", "a cat is on the mat"),
    ("She won the race!", "she won a race"),
    ("nothing alike", "quite different words"),
    ("", "something"),
    ("The End.", "the end"),
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It takes 2/2 = 1 bolt.\n#### 3", 3),
        ("#### 1,234", 1234),
        ("48/2 = <<48/2=24>>24 clips.\n#### 72 clips in 2 months", 72),
        ("#### -$5.50.", Fraction(-11, 2)),
        ("The answer is 576.", 576),
        ("She pays $1,000.00 each", 1000),
        ("3 - 4 = -1", -1),
        ("pages 3-4", 4),
        ("(−7)", -7),
        ("he ate 1/2", Fraction(1, 2)),
        ("half: .5", Fraction(1, 2)),
        ("5/0", 5),
        ("-1,000,000%", -1_000_000),
        ("0", 0),
        ("either 10,20", 20),
        ("x5 is a name", None),
        ("#### none of the 3", 3),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: object) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("name", "written", "wanted", "value"),
    [
        ("exact_match", " a b\n", "a b", 1),
        ("exact_match", "A b", "a b", 0),
        ("final_number", "so it is 42.0", "40+2=42\n#### 42", 1),
        ("final_number", "#### 1234", "#### 1,234", 1),
        ("final_number", "1/3", "2/3", 0),
        ("final_number", "no idea", "#### 0", 0),
        ("f1", "The cat sat!", "a cat", 2 / 3),  # one word of two, one of one
        ("f1", "to be or not", "not to be or", 1),
        ("rouge_l", "the cat sat on the mat", "a cat is on the mat", 4 / 6),  # cat on the mat
        ("rouge_l", "to be or not", "not to be or", 3 / 4),
        ("rouge_l", "one", "one two three", 0.5),  # precision 1, recall 1/3
    ],
)
def test_metrics_by_hand(name: Any, written: str, wanted: str, value: float) -> None:
    assert measure(name, [written], [wanted]) == [pytest.approx(value, abs=1e-6)]


def test_f1_and_rouge_are_the_librarys() -> None:
    written, wanted = zip(*SENTENCES, strict=True)
    theirs = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(written)],
        [{"answers": {"answer_start": [0], "text": [text]}, "id": str(i)} for i, text in enumerate(wanted)],
    )
    assert 100 * np.mean(measure("f1", written, wanted)) == pytest.approx(float(theirs["f1"]), abs=1e-4)
    rouge = rouge_score(list(written), list(wanted), rouge_keys="rougeL")["rougeL_fmeasure"]
    assert np.mean(measure("rouge_l", written, wanted)) == pytest.approx(float(rouge), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "where", "words"),
    [
        ({"type": "text", "metrics": ["bleu"]}, ("metrics", 0), "exact_match"),
        ({"type": "text", "metrics": ["accuracy"]}, ("metrics",), "not a metric of text tasks"),
        ({"type": "yes_no", "metrics": ["f1"]}, ("metrics",), "which have accuracy"),
        ({"labels": ["a", "b"], "metrics": ["rouge_l"]}, ("metrics",), "not a metric of choice tasks"),
        ({"metrics": ["accuracy", "f1"]}, ("metrics",), "no task has all of"),
        ({"metrics": ["f1", "f1"]}, ("metrics",), "metrics must be unique"),
        ({"metrics": []}, ("metrics",), "at least 1"),
    ],
)
def test_metrics_that_cant_be_are_refused(
    settings: dict[str, Any], where: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        TaskSettings(**settings)
    (fault,) = refused.value.errors()
    assert fault["loc"] == where
    assert words in fault["msg"]


def test_metrics_are_held_against_the_task_that_rows_imply() -> None:
    with pytest.raises(ConfigError, match="not a metric of yes_no tasks") as refused:
        Task.resolve(TaskSettings(metrics=["final_number"]), "yes_no")
    assert refused.value.param == "task.metrics"
    assert Task.resolve(TaskSettings(metrics=["f1", "rouge_l"]), "text").metrics == ("f1", "rouge_l")
    assert Task.resolve(TaskSettings(), "choice").metrics == ("accuracy",)
    older = {"type": "text", "template": "{prompt}", "labels": None}
    assert Task.from_json(older).metrics == ("exact_match",)


def test_intervals_of_graded_means() -> None:
    """For 0 and 1 it is the plus-four interval; values that are all alike don't look certain."""
    low, high = mean_interval([1.0] * 30 + [0.0] * 10)
    share = 32 / 44
    half = 1.959964 * (share * (1 - share) / 44) ** 0.5
    assert (low, high) == pytest.approx((share - half, share + half))
    assert mean_interval([0.0] * 20)[1] > 0.1
    values = np.random.default_rng(0).beta(2, 5, size=400)
    low, high = mean_interval(values)
    plain = 1.959964 * values.std() / 20
    assert low < values.mean() < high
    assert 1 < (high - low) / 2 / plain < 1.2


def test_values_come_back_from_text() -> None:
    values = [0.0, 1.0, 0.3333333, 0.5]
    assert unpack_graded(pack_graded(values), 4) == pytest.approx(values, abs=1e-5)
    with pytest.raises(ValueError, match="4 values don't belong to 5 rows"):
        unpack_graded(pack_graded(values), 5)


def test_an_evaluation_says_all_metrics_and_keeps_the_first_ones_rows() -> None:
    graded = Evaluation.of({"f1": [0.5, 1.0], "exact_match": [0.0, 1.0]})
    told = graded.to_json()
    assert (told["metric"], told["accuracy"], told["correct"]) == ("f1", 0.75, None)
    assert {name: one["value"] for name, one in told["metrics"].items()} == {"f1": 0.75, "exact_match": 0.5}
    assert unpack_graded(graded.packed_rows()["values"], 2) == pytest.approx([0.5, 1.0], abs=1e-5)
    right = Evaluation.of({"exact_match": [0.0, 1.0], "f1": [0.5, 1.0]})
    assert right.correct == 1
    assert unpack_correctness(right.packed_rows()["right"], 2).tolist() == [False, True]


# -- through a run ----------------------------------------------------------------------------------------------------


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"is it {n}", "completion": f" in the language\n#### {n}"} for n in range(count)]


def test_a_run_measures_by_the_metrics_of_its_task(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def generate(lm: Any, examples: Any, *, ends: Any, max_new_tokens: list[int], **rest: Any) -> Any:
        seen.append(max_new_tokens)
        # Right, right but for what leads there, and wrong.
        texts = [sums(3)[0]["completion"], "#### 1", "#### 7"]
        return [encoder.continuation(text) for text in texts]

    def evaluated(lm: Any, coder: Any, *args: Any, **options: Any) -> Evaluation:
        nonlocal encoder
        encoder = coder
        return evaluate(lm, coder, *args, **options)

    encoder: Any = None
    monkeypatch.setattr(evaluation_module, "generate", generate)
    monkeypatch.setattr("heft_engine.training.run.evaluate", evaluated)
    task = TaskSettings(metrics=["f1", "final_number", "exact_match"])
    settings = config(tiny_llama_dir, "reft", [but(reft(), n_epochs=1)]).model_copy(update={"task": task})
    told = run(settings, tmp_path / "out", rows_of(sums(8)), test_rows=rows_of(sums(3)))

    assert told.bundle is not None
    assert told.bundle.info.task["metrics"] == ["f1", "final_number", "exact_match"]
    record = told.bundle.info.evaluation
    assert record is not None
    metrics = record["results"][-1]["metrics"]
    assert record["metric"] == "f1"
    assert metrics["final_number"]["value"] == pytest.approx(2 / 3)
    assert metrics["exact_match"]["value"] == pytest.approx(1 / 3)
    assert record["results"][-1]["accuracy"] == metrics["f1"]["value"]
    outcomes = told.one("SUCCEEDED")["outcomes"]
    values = unpack_graded(outcomes["results"][-1]["values"], 3)
    assert values[0] == 1.0
    assert values.mean() == pytest.approx(metrics["f1"]["value"], abs=1e-5)
    # Every row may write what serving would let it, whatever the right answer's length.
    assert {budget for budgets in seen for budget in budgets} == {told.bundle.info.max_new_tokens}


def test_an_answer_without_a_number_is_a_fault_of_its_row(tiny_llama_dir: Path, tmp_path: Path) -> None:
    task = TaskSettings(metrics=["final_number"])
    settings = config(tiny_llama_dir, "reft", [reft()]).model_copy(update={"task": task})
    with pytest.raises(RowError, match="needs a number in every answer") as refused:
        run(settings, tmp_path / "out", rows_of([*sums(2), {"prompt": "is it", "completion": " no"}]))
    assert refused.value.param == "completion"


def test_an_exact_match_that_cant_be_any_more_is_not_written_to_its_end(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same verdict as when all is written, from fewer tokens."""
    generate, lengths, texts = evaluation_module.generate, [], []

    def counting(*args: Any, is_enough: Any, **options: Any) -> Any:
        short = generate(*args, is_enough=is_enough, **options)
        whole = generate(*args, **options)
        lengths.append((sum(map(len, short)), sum(map(len, whole))))
        texts.append([one[: len(other)] == other for one, other in zip(whole, short, strict=True)])
        return short

    monkeypatch.setattr(evaluation_module, "generate", counting)
    settings = config(tiny_llama_dir, "reft", [but(reft(), n_epochs=1)])
    told = run(settings, tmp_path / "out", rows_of(sums(8)), test_rows=rows_of(sums(4)))
    assert told.bundle is not None
    assert all(all(same) for same in texts)
    assert all(short < whole / 2 for short, whole in lengths)


def test_what_is_measured_is_what_serving_writes(tiny_llama_dir: Path) -> None:
    """Up to the token that ends a turn of a chat model, which is not the tokenizer's own end."""
    model = load_model(resolve_path(tiny_llama_dir), dtype=torch.float32, attention=IMPLEMENTATION)
    lm = PackedLM(model)
    task = Task.resolve(TaskSettings(metrics=["f1"]), "text")
    encoder = Encoder(load_tokenizer(tiny_llama_dir), task)
    row = rows_of([{"prompt": "all of what the sky is", "completion": " blue"}])[0]
    (example,) = encoder.encode(row)
    (whole,) = evaluation_module.generate(lm, [example], ends=(), max_new_tokens=[12])
    end = whole[-1]
    model.generation_config.eos_token_id = [end]
    (written,) = evaluation_module._written(lm, encoder, [example], ["any"], 12)
    predictor = Predictor(ModelVariant(lm=lm), encoder, max_new_tokens=12)
    (served,) = predictor.predict([row])
    assert written == served.answer == decode(encoder.tokenizer, whole[: whole.index(end)])
    assert end != encoder.tokenizer.eos_token_id
