"""The temperature: recovered where it is known, measured on rows it was not fitted on, stored in the bundle."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_command import Command, command, write_rows
from engine_runs import LORA, REFT, ROWS, RunRecord, but, config, parse, run, yes_no

from heft_engine.bundle.format import read_bundle
from heft_engine.config.train import TrainConfig
from heft_engine.evaluation.calibration import (
    LabelledScores,
    calibrate,
    cross_fit,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from heft_engine.inference.scoring import Scores
from heft_engine.serving.predictor import load
from heft_engine.training.stage_store import LocalStages

__all__ = ["command"]

QUICK: list[Any] = [but(LORA, n_epochs=1), but(REFT, n_epochs=1)]


def drawn(
    n: int, temperature: float, *, seed: int = 0, widths: tuple[int, ...] = (2, 3, 5)
) -> LabelledScores:
    """Rows of 2, 3 and 5 labels whose right label is drawn from softmax(totals / temperature)."""
    rng = np.random.default_rng(seed)
    scores, gold = [], []
    for index in range(n):
        totals = rng.normal(scale=4.0, size=widths[index % len(widths)])
        row_scores = Scores(totals=tuple(totals), means=())
        scores.append(row_scores)
        gold.append(int(rng.choice(len(totals), p=row_scores.probabilities_at(temperature))))
    return LabelledScores.of(scores, gold)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    rows = drawn(4_000, temperature)
    assert fit_temperature(rows) == pytest.approx(temperature, rel=0.08)
    calibration = calibrate(rows, None, "validation")
    assert calibration is not None
    assert (calibration.method, calibration.n, calibration.fitted_rows) == ("cross_fitted", 4_000, 4_000)
    assert calibration.ece_after < 0.03
    assert calibration.nll_after <= calibration.nll_before + 1e-3
    if temperature == 3.0:
        assert calibration.ece_before > 0.1


def test_after_is_measured_on_rows_that_the_temperature_has_not_seen() -> None:
    fitted, other = drawn(400, 2.0), drawn(300, 0.7, seed=1)
    held_out = calibrate(fitted, other, "test")
    assert held_out is not None
    assert (held_out.method, held_out.n, held_out.fitted_rows) == ("held_out", 300, 400)
    assert held_out.temperature == fit_temperature(fitted)
    assert held_out.nll_after > held_out.nll_before, "the loss grows on rows of another temperature"

    temperatures = cross_fit(fitted)
    assert len(set(temperatures)) == 5
    fold = temperatures == temperatures[0]
    assert 60 <= fold.sum() <= 100
    assert temperatures[0] == fit_temperature(fitted[~fold])


def test_a_handful_of_rows_or_none_leave_the_temperature_at_one() -> None:
    few, none = drawn(19, 3.0), drawn(0, 3.0)
    for fitted, reported in ((few, None), (none, drawn(50, 3.0)), (few, drawn(50, 3.0))):
        calibration = calibrate(fitted, reported, "test")
        assert calibration is not None
        assert (calibration.temperature, calibration.method, calibration.fitted_rows) == (
            1.0,
            "not_fitted",
            0,
        )
        assert (calibration.ece_after, calibration.nll_after) == (
            calibration.ece_before,
            calibration.nll_before,
        )
    assert calibrate(none, None, "validation") is None


def test_rows_that_are_all_right_claim_no_certainty() -> None:
    rows = LabelledScores.of([Scores(totals=(1.0, 0.0), means=())] * 50, [0] * 50)
    sure = Scores(totals=(1.0, 0.0), means=()).probabilities_at(fit_temperature(rows))[0]
    assert 0.95 < sure < 0.99
    assert sure == pytest.approx(1 - 1 / 52, abs=1e-3)


def test_rows_that_are_all_wrong_stay_within_bounds() -> None:
    rows = LabelledScores.of([Scores(totals=(9.0, 0.0), means=())] * 50, [1] * 50)
    assert 20 < fit_temperature(rows) <= 50


def test_the_error_is_that_of_the_paper() -> None:
    """Three rows in one bin and one in another, by hand."""
    confident = Scores(totals=(math.log(0.9), math.log(0.1)), means=())
    unsure = Scores(totals=(math.log(0.4), math.log(0.6)), means=())
    rows = LabelledScores.of([confident, confident, confident, unsure], [0, 0, 1, 1])
    ones = np.ones(4)
    expected = 3 / 4 * abs(2 / 3 - 0.9) + 1 / 4 * abs(1 - 0.6)
    assert expected_calibration_error(rows, ones) == pytest.approx(expected)
    nats = -(2 * math.log(0.9) + math.log(0.1) + math.log(0.6)) / 4
    assert negative_log_likelihood(rows, ones) == pytest.approx(nats)


def test_rows_without_an_answer_or_a_number_are_left_out() -> None:
    good, bad = Scores(totals=(0.0, 1.0), means=()), Scores(totals=(math.nan, 1.0), means=())
    rows = LabelledScores.of([good, bad, good], [None, 1, 1])
    assert len(rows) == 1
    assert rows.gold.tolist() == [1]


@pytest.mark.parametrize("kind", ["yes_no", "choice"])
def test_a_run_calibrates_its_model_and_every_stage_of_it(
    tiny_llama_dir: Path, tmp_path: Path, kind: str
) -> None:
    validation, test = parse(ROWS[kind](30, seed=1)), parse(ROWS[kind](25, seed=2))
    settings = config(tiny_llama_dir, stages=QUICK)
    rows, folder, out = parse(ROWS[kind](12)), tmp_path / "checkpoints", tmp_path / "out"
    trained = run(settings, out, rows, validation, test_rows=test, checkpoint_dir=folder)
    record = trained.one("SUCCEEDED")["evaluation"]["calibration"]
    assert (record["method"], record["split"], record["n"]) == ("held_out", "test", 25)
    assert record["fitted_rows"] == 30
    assert record["temperature"] != 1

    assert trained.bundle is not None
    assert trained.bundle.info.temperature == record["temperature"]
    assert trained.bundle.info.calibration == record
    stages = [Path(data["path"]) for data in trained.data("CHECKPOINT_SAVED") if data["kind"] == "stage"]
    first, last = (read_bundle(path / "bundle").info for path in stages)
    assert last.temperature == record["temperature"] != first.temperature != 1
    assert first.evaluation is not None
    assert first.evaluation["calibration"]["temperature"] == first.temperature

    predictor = load(out, device="cpu")
    calibrated = predictor.predict(test)
    predictor.temperature = 1.0
    plain = predictor.predict(test)
    assert [prediction.answer for prediction in calibrated] == [prediction.answer for prediction in plain]
    for prediction, uncalibrated in zip(calibrated, plain, strict=True):
        assert prediction.label_probabilities is not None
        assert uncalibrated.label_probabilities is not None
        powers = {k: p ** (1 / record["temperature"]) for k, p in uncalibrated.label_probabilities.items()}
        expected = {label: power / sum(powers.values()) for label, power in powers.items()}
        assert prediction.label_probabilities == pytest.approx(expected)
        assert prediction.probability == prediction.label_probabilities[prediction.answer]
    gold = [row.answer for row in test]
    chosen = [prediction.label_probabilities[g] for prediction, g in zip(calibrated, gold, strict=True)]  # type: ignore[index]
    assert -np.log(chosen).mean() == pytest.approx(record["nll_after"])


@dataclass(frozen=True, kw_only=True)
class LoraRun:
    """A LoRA run with 30 validation rows and no test rows, and the store that has its stage."""

    settings: TrainConfig
    record: RunRecord
    out: Path
    stage_store: LocalStages


VALIDATION = yes_no(30, seed=1)


@pytest.fixture(scope="module")
def lora_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    folder = tmp_path_factory.mktemp("once")
    settings, stage_store = config(tiny_llama_dir, "lora", QUICK[:1]), LocalStages(directory=folder / "kept")
    record = run(
        settings,
        folder / "out",
        None,
        parse(VALIDATION),
        stage_store=stage_store,
        checkpoint_dir=folder / "checkpoints",
    )
    return LoraRun(settings=settings, record=record, out=folder / "out", stage_store=stage_store)


def test_without_test_rows_it_is_cross_fitted_and_without_validation_rows_it_says_that_nothing_was(
    lora_run: LoraRun, tmp_path: Path
) -> None:
    calibration = lora_run.record.one("SUCCEEDED")["evaluation"]["calibration"]
    assert (calibration["method"], calibration["split"]) == ("cross_fitted", "validation")
    assert (calibration["n"], calibration["fitted_rows"]) == (30, 30)
    other = run(lora_run.settings, tmp_path / "other", None, test_rows=parse(VALIDATION)).one("SUCCEEDED")
    record = other["evaluation"]["calibration"]
    assert (record["method"], record["temperature"]) == ("not_fitted", 1.0)
    assert record["nll_before"] == pytest.approx(calibration["nll_before"])
    assert read_bundle(tmp_path / "other").info.temperature == 1.0


def test_a_text_task_has_none(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = parse(ROWS["text"](8))
    record = run(config(tiny_llama_dir, "lora", QUICK[:1]), tmp_path / "out", rows, rows[:2])
    assert record.one("SUCCEEDED")["evaluation"]["calibration"] is None
    assert record.bundle is not None
    assert (record.bundle.info.temperature, record.bundle.info.calibration) == (1.0, None)


def test_a_reused_or_resumed_result_has_the_same_temperature(lora_run: LoraRun, tmp_path: Path) -> None:
    rows = parse(VALIDATION)
    reused = run(lora_run.settings, tmp_path / "reused", None, rows, stage_store=lora_run.stage_store)
    end = [data["path"] for data in lora_run.record.data("CHECKPOINT_SAVED") if data["kind"] == "stage"]
    resumed = run(lora_run.settings, tmp_path / "resumed", None, rows, resume=Path(end[-1]))
    assert reused.one("STAGE_REUSED")["stage"] == "lora"
    assert lora_run.record.bundle is not None
    assert lora_run.record.bundle.info.temperature != 1
    for other in (reused, resumed):
        assert other.bundle is not None
        assert other.bundle.info == lora_run.record.bundle.info


def test_a_bundle_from_before_there_were_temperatures_answers_as_it_did(
    lora_run: LoraRun, tmp_path: Path
) -> None:
    old = shutil.copytree(lora_run.out, tmp_path / "old")
    info = json.loads((old / "heft.json").read_text())
    del info["temperature"], info["calibration"]
    (old / "heft.json").write_text(json.dumps(info))
    assert load(old, device="cpu").temperature == 1.0


def test_the_command_says_what_probabilities_are_worth(
    lora_run: LoraRun, tmp_path: Path, command: Command
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", VALIDATION)
    code, printed, _ = command("evaluate", "--bundle", lora_run.out, "--data", data, "--device", "cpu")
    assert code == 0
    assert lora_run.record.bundle is not None
    assert printed[0]["temperature"] == lora_run.record.bundle.info.temperature
    predictions = load(lora_run.out, device="cpu").predict(parse(VALIDATION))
    gold = ["yes" if row["answer"] else "no" for row in VALIDATION]
    chosen = [prediction.label_probabilities[g] for prediction, g in zip(predictions, gold, strict=True)]  # type: ignore[index]
    assert printed[0]["nll"] == pytest.approx(-np.log(chosen).mean())
    assert 0 <= printed[0]["ece"] <= 1


def test_the_command_withholds_what_is_not_probable_enough(
    lora_run: LoraRun, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_rows(tmp_path / "rows.jsonl", VALIDATION).read_text()

    def ask(*options: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code, answers, _ = command("predict", "--bundle", lora_run.out, "--device", "cpu", *options)
        assert code == 0
        return answers

    all_of_them = ask()
    middle = sorted(answer["probability"] for answer in all_of_them)[15]
    for answer, full_answer in zip(ask("--abstain-below", str(middle)), all_of_them, strict=True):
        unsure = full_answer["probability"] < middle
        assert answer == full_answer | {
            "answer": None if unsure else full_answer["answer"],
            "abstained": unsure,
        }
    assert not any(answer["abstained"] for answer in all_of_them)


def test_the_command_goes_on_with_a_file_of_answers(
    lora_run: LoraRun, tmp_path: Path, command: Command
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", VALIDATION), tmp_path / "answers.jsonl"
    flags = ["predict", "--bundle", lora_run.out, "--device", "cpu", "--file", rows, "--out", out]
    assert command(*flags)[:2] == (0, [])
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:11]) + lines[11][:5])
    assert command(*flags)[0] == 0
    assert out.read_text() == whole
    code, _, err = command(*flags, "--scale", "0.5")
    assert code == 1
    assert json.loads(err.splitlines()[-1])["error"]["param"] == "out"
