"""The result of a run so far: evaluated, measured for its bundle, and written and checked against training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from heft_engine.adapters.lora.merge import merged_in_float32
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.adapters.parity import TOKEN_BUDGET
from heft_engine.bundle.format import (
    BaseRecord,
    Bundle,
    BundleInfo,
    Probe,
    package_versions,
    read_bundle,
    write_bundle,
)
from heft_engine.data.encoding import Example, tokenizer_hash
from heft_engine.evaluation.calibration import MAX_ROWS, Calibration, LabelledScores, calibrate
from heft_engine.evaluation.evaluate import evaluate
from heft_engine.inference.scoring import Scores, score, score_hidden
from heft_engine.model.float32_lm import Float32LM
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.model_files import weights_hash
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, pack
from heft_engine.runtime.devices import dtype_name
from heft_engine.runtime.out_of_memory import run_in_halves
from heft_engine.training import failure_signatures
from heft_engine.training.checkpoint import RunState
from heft_engine.training.setup import RunInputs

#: A text task's answers may be as long as the longest training answer, within these bounds (tokens).
_LEAST_NEW_TOKENS, _MOST_NEW_TOKENS = 64, 1_024


@dataclass(frozen=True, kw_only=True)
class StageMeasurements:
    """Measurements of a stage's result that its bundle holds.

    calibration: None for text, and without rows to measure on. validation_scores: of `validation_sample`, where they
    have been computed for the calibration. valid_accuracy: the share of right answers on `validation_sample`.
    """

    probe: Probe
    probe_tolerance: float
    calibration: Calibration | None
    validation_scores: tuple[Scores, ...] | None = None
    valid_accuracy: float | None = None


def evaluate_stage(inputs: RunInputs, index: int | None) -> tuple[dict[str, Any], tuple[Scores, ...]]:
    """Evaluates the model after stage `index` (None: before all stages) on the reported rows.

    Returns the record that RunState.evaluations holds, and the rows' scores where labels were scored.
    """
    before = "base" if inputs.start is None else "start"
    stage = before if index is None else inputs.config.stages[index].type
    record = {"stage": stage, "stage_index": index}
    if not inputs.reported:
        return record, ()
    limit = max_new_tokens(inputs.examples)
    evaluation = evaluate(inputs.lm, inputs.encoder, inputs.reported, max_new_tokens=limit)
    return {**record, **evaluation.to_json(), **evaluation.packed_rows()}, evaluation.scores


def measure_stage(inputs: RunInputs, scores: Sequence[Scores] = ()) -> StageMeasurements:
    """Measures the model as it is now. scores: of the reported rows, if they are known."""
    probe = _probe(inputs)
    tolerance = _tolerance(Float32LM(inputs.lm), inputs.lm, probe)
    if inputs.encoder.task.type == "text" or not inputs.reported:
        return StageMeasurements(probe=probe, probe_tolerance=tolerance, calibration=None)
    scores = scores or score(inputs.lm, inputs.reported)
    reported = _labelled(scores, inputs.reported)
    sample = validation_sample(inputs)
    if inputs.split == "validation":
        return StageMeasurements(
            probe=probe,
            probe_tolerance=tolerance,
            calibration=calibrate(reported, None, inputs.split),
            valid_accuracy=_share_right([scores[place] for place in _validation_places(inputs)], sample),
        )
    validation_scores = tuple(score(inputs.lm, sample))
    return StageMeasurements(
        probe=probe,
        probe_tolerance=tolerance,
        calibration=calibrate(_labelled(validation_scores, sample), reported, inputs.split),
        validation_scores=validation_scores,
        valid_accuracy=_share_right(validation_scores, sample),
    )


def measure_epoch(inputs: RunInputs, weights: LoraWeights | None) -> StageMeasurements:
    """Measures the model in the middle of a stage for a bundle. weights: of the attached adapter.

    Without a calibration, which would score all validation rows.
    """
    exact = Float32LM(inputs.lm) if weights is None else merged_in_float32(inputs.lm, weights)
    probe = _probe(inputs)
    tolerance = _tolerance(exact, inputs.lm, probe)
    return StageMeasurements(probe=probe, probe_tolerance=tolerance, calibration=None)


def _probe(inputs: RunInputs) -> Probe:
    examples = [example for _, example in inputs.bundle_probes]
    return Probe(examples=examples, scores=[row.totals for row in score(inputs.lm, examples)])


def write_result(
    inputs: RunInputs,
    state: RunState,
    measured: StageMeasurements,
    interventions: Sequence[PlacedIntervention],
    out_dir: Path,
) -> Bundle:
    """Writes the bundle of the result so far. Raises TrainingError if serving would see other prompts than training."""
    calibration = measured.calibration
    stages_before = inputs.start.info.stages if inputs.start is not None else []
    parity_before = inputs.start.info.parity if inputs.start is not None else []
    # In a bundle, stages are counted over all its runs.
    own_parity = [
        {**record, "stage_index": len(stages_before) + record["stage_index"]} for record in state.parity
    ]
    info = BundleInfo(
        method=inputs.config.method,
        stages=[*stages_before, *(stage.model_dump() for stage in inputs.config.stages[: state.stage_index])],
        base_model=BaseRecord(
            reference=inputs.base.reference,
            source=inputs.base.source,
            revision=inputs.base.revision,
            model_type=inputs.lm.config.model_type,
            weights_sha256=weights_hash(inputs.base.path),
        ),
        task=inputs.encoder.task.to_json(),
        tokenizer_sha256=tokenizer_hash(inputs.encoder.tokenizer),
        dtype=dtype_name(inputs.lm.dtype),
        base_quantization=inputs.config.base_quantization,
        max_length=inputs.encoder.max_length,
        seed=inputs.config.seed,
        max_new_tokens=max_new_tokens(inputs.examples),
        temperature=calibration.temperature if calibration is not None else 1.0,
        calibration=calibration.to_json() if calibration is not None else None,
        evaluation=evaluation_summary(inputs, state, calibration),
        parity=[*parity_before, *own_parity],
        started_from=inputs.start.ancestry if inputs.start is not None else [],
        probe_tolerance=measured.probe_tolerance,
        versions=package_versions(inputs.config.base_quantization),
    )
    write_bundle(out_dir, info, state.adapters, list(interventions), inputs.encoder.tokenizer, measured.probe)
    bundle = read_bundle(out_dir)
    rows = [row for row, _ in inputs.bundle_probes]
    failure_signatures.check_positions(bundle, inputs.encoder, rows, interventions)
    return bundle


def evaluation_summary(
    inputs: RunInputs, state: RunState, calibration: Calibration | None
) -> dict[str, Any] | None:
    """Returns the evaluations so far as the bundle and the job show them; None without rows to evaluate on."""
    evaluations = [record for record in state.evaluations if "accuracy" in record]
    if not evaluations:
        return None
    names = ("stage", "stage_index", "accuracy", "correct", "interval_95", "metrics")
    return {
        "n": evaluations[0]["n"],
        "metric": evaluations[0]["metric"],
        "split": inputs.split,
        "held_out": inputs.split == "test",
        "results": [_select(record, names) for record in evaluations],
        "calibration": calibration.to_json() if calibration is not None else None,
        "general_loss": state.general_loss,
    }


def row_results(
    inputs: RunInputs, state: RunState, validation: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Returns which rows were right (or how right they were) after each stage, for comparisons between runs.

    None without rows to evaluate on, or if an evaluation was made without them. validation: `validation_result`.
    """
    evaluations = [record for record in state.evaluations if "right" in record or "values" in record]
    if not evaluations or len(evaluations) < len(state.evaluations):
        return None
    names = ("stage", "stage_index", "right", "values")
    return {
        "n": evaluations[0]["n"],
        "metric": evaluations[0]["metric"],
        "split": inputs.split,
        "rows_sha256": answers_hash(inputs.reported),
        "results": [_select(record, names) for record in evaluations],
        "validation": validation,
    }


def validation_result(
    inputs: RunInputs, measured: StageMeasurements, *, generate_text: bool
) -> dict[str, Any] | None:
    """Returns the metric on validation rows where test rows are reported: a search chooses by it.

    It is of at most MAX_ROWS rows. None without validation rows, and for text unless `generate_text`: generating may
    take as long as an epoch.
    """
    if inputs.split != "test" or not inputs.questions:
        return None
    sample = validation_sample(inputs)
    if inputs.encoder.task.type == "text":
        if not generate_text:
            return None
        limit = max_new_tokens(inputs.examples)
        evaluation = evaluate(inputs.lm, inputs.encoder, sample, max_new_tokens=limit)
        return {"n": evaluation.n, "metric": evaluation.metric, "value": evaluation.accuracy}
    scores = measured.validation_scores or score(inputs.lm, sample)
    return {"n": len(sample), "metric": "accuracy", "value": _share_right(scores, sample)}


def valid_accuracy(inputs: RunInputs) -> float | None:
    """Returns the share of right answers on `validation_sample`; None for text, and without validation rows."""
    if inputs.encoder.task.type == "text" or not inputs.questions:
        return None
    sample = validation_sample(inputs)
    return _share_right(score(inputs.lm, sample), sample)


def _share_right(scores: Sequence[Scores], examples: Sequence[Example]) -> float | None:
    """Returns the share of examples whose right answer has the best score; None without examples."""
    if not examples:
        return None
    return sum(row.best == example.gold for row, example in zip(scores, examples, strict=True)) / len(
        examples
    )


def validation_sample(inputs: RunInputs) -> list[Example]:
    """Returns at most MAX_ROWS validation rows, drawn by the run's seed, with every label as an answer."""
    return [inputs.questions[place] for place in _validation_places(inputs)]


def _validation_places(inputs: RunInputs) -> list[int]:
    rows = len(inputs.questions)
    return Random(inputs.config.seed).sample(range(rows), min(MAX_ROWS, rows))


def answers_hash(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of the possible and the right answers, in order: the same however rows are truncated."""
    total = hashlib.sha256()
    for example in examples:
        total.update(repr((example.labels, example.gold)).encode())
    return total.hexdigest()


def max_new_tokens(examples: Sequence[Example]) -> int:
    """Returns the limit of generated answers, for measuring and serving a model trained on these examples."""
    longest = max(example.supervised_tokens for example in examples)
    return min(max(_LEAST_NEW_TOKENS, longest), _MOST_NEW_TOKENS)


def _select(record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: record[name] for name in names if name in record}


def _labelled(scores: Sequence[Scores], examples: Sequence[Example]) -> LabelledScores:
    return LabelledScores.of(scores, [example.gold for example in examples])


def _tolerance(exact: Float32LM, lm: PackedLM, probe: Probe) -> float:
    """Returns how far a probe score may lie elsewhere: four times the error of the dtype alone, at least 1e-3.

    exact: the float32 passes of `lm`.
    """
    exact.interventions.extend(lm.interventions)
    pairs = zip(_float32_totals(exact, probe.examples), probe.scores, strict=True)
    errors = [abs(a - b) for exact, totals in pairs for a, b in zip(exact, totals, strict=True)]
    return max(1e-3, 4 * max(errors))


@torch.inference_mode()
def _float32_totals(exact: Float32LM, examples: Sequence[Example]) -> list[tuple[float, ...]]:
    """Returns the totals of every example in float32, one pass after the other."""

    def totals(rows: Sequence[Example]) -> list[tuple[float, ...]]:
        batch = pack(rows)
        return [row.totals for row in score_hidden(exact, batch, exact.hidden(batch))]

    return [
        row_totals
        for rows in micro_batches(examples, TOKEN_BUDGET)
        for part in run_in_halves(totals, rows, exact.device)
        for row_totals in part
    ]
