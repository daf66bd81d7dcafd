"""What a run leaves behind: its bundle, with probe rows, evaluation and parity, checked against training itself.

It does NOT train, and it does not decide where bundles go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from heft_engine.adapters.parity import float32_copy
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
from heft_engine.inference.scoring import Scores, score
from heft_engine.model.model_files import weights_hash
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import dtype_name
from heft_engine.training import failure_signatures

if TYPE_CHECKING:
    from heft_engine.training.run import Run

#: A text task's answers may be as long as the longest that was trained on, within these bounds (tokens).
LEAST_NEW_TOKENS, MOST_NEW_TOKENS = 64, 1_024


def write_outcome(run: Run, out_dir: Path) -> Bundle:
    """The bundle of the result so far. Raises TrainingError when serving would see other prompts than training."""
    probe, tolerance = _probe(run)
    calibrated = calibration(run)
    info = BundleInfo(
        method=run.config.method,
        stages=[stage.model_dump() for stage in run.config.stages[: run.state.stage_index]],
        base_model=BaseRecord(
            reference=run.base.reference,
            source=run.base.source,
            revision=run.base.revision,
            model_type=run.lm.config.model_type,
            weights_sha256=weights_hash(run.base.path),
        ),
        task=run.encoder.task.to_json(),
        tokenizer_sha256=tokenizer_hash(run.encoder.tokenizer),
        dtype=dtype_name(run.lm.dtype),
        max_length=run.encoder.max_length,
        seed=run.config.seed,
        max_new_tokens=max_new_tokens(run),
        temperature=calibrated.temperature if calibrated is not None else 1.0,
        calibration=calibrated.to_json() if calibrated is not None else None,
        evaluation=evaluation(run),
        parity=run.state.parity,
        probe_tolerance=tolerance,
        versions=package_versions(),
    )
    write_bundle(out_dir, info, run.adapters, list(run.lm.interventions), run.encoder.tokenizer, probe)
    bundle = read_bundle(out_dir)
    failure_signatures.check_positions(
        bundle, run.encoder, [row for row, _ in run.probe_rows], run.lm.interventions
    )
    return bundle


def evaluation(run: Run) -> dict[str, Any] | None:
    """The job's evaluation so far: None without rows to evaluate on."""
    results = [record for record in run.state.evaluations if "accuracy" in record]
    if not results:
        return None
    calibrated = calibration(run)
    kept = ("stage", "stage_index", "accuracy", "correct", "interval_95", "metrics")
    return {
        "n": results[0]["n"],
        "metric": results[0]["metric"],
        "split": run.split,
        "held_out": run.split == "test",
        "results": [{name: record[name] for name in kept if name in record} for record in results],
        "calibration": calibrated.to_json() if calibrated is not None else None,
        "general_loss": run.state.general_loss,
    }


def calibration(run: Run) -> Calibration | None:
    """The result's temperature, computed once a stage: its checkpoint is a model that can be asked, as the end is.

    None for text, and without rows to measure on.
    """
    if run.encoder.task.type == "text" or not run.reported:
        return None
    index = run.state.stage_index
    if run.calibrated is None or run.calibrated[0] != index:
        if run.scored is None or run.scored[0] != index:
            run.scored = (index, tuple(score(run.lm, run.reported)))
        reported = _labelled(run.scored[1], run.reported)
        if run.split == "validation":
            found = calibrate(reported, None, run.split)
        else:
            chosen = _chosen(run)
            run.chosen = tuple(score(run.lm, chosen))
            found = calibrate(_labelled(run.chosen, chosen), reported, run.split)
        run.calibrated = (index, found)
    return run.calibrated[1]


def on_validation(run: Run) -> dict[str, Any] | None:
    """What the result came to on validation rows, where others are reported: what a search chooses by.

    At most so many rows as calibration takes, and its own scores where it has any. None without validation rows, and
    for text unless the run was told to write it: that may take as long as an epoch.
    """
    if run.split != "test" or not run.questions:
        return None
    chosen = _chosen(run)
    if run.encoder.task.type == "text":
        if not run.writes_validation:
            return None
        found = evaluate(run.lm, run.encoder, chosen, max_new_tokens=max_new_tokens(run))
        return {"n": found.n, "metric": found.metric, "value": found.accuracy}
    calibration(run)
    assert run.chosen is not None
    right = sum(one.best == example.gold for one, example in zip(run.chosen, chosen, strict=True))
    return {"n": len(chosen), "metric": "accuracy", "value": right / len(chosen)}


def _chosen(run: Run) -> list[Example]:
    return Random(run.config.seed).sample(run.questions, min(MAX_ROWS, len(run.questions)))


def _labelled(scores: Sequence[Scores], examples: Sequence[Example]) -> LabelledScores:
    return LabelledScores.of(scores, [example.gold for example in examples])


def _probe(run: Run) -> tuple[Probe, float]:
    """The probe rows' scores and their tolerance, computed once a stage: its checkpoint and the end both write them."""
    if run.probed is None or run.probed[0] != run.state.stage_index:
        examples = [example for _, example in run.probe_rows]
        totals = [scores.totals for scores in score(run.lm, examples)]
        probe = Probe(examples=examples, scores=totals)
        run.probed = (run.state.stage_index, probe, _tolerance(run.lm, probe))
    return run.probed[1], run.probed[2]


def _tolerance(lm: PackedLM, probe: Probe) -> float:
    """How far a probe score may lie elsewhere: four times what the dtype alone moves it, at least 1e-3."""
    exact = float32_copy(lm)
    exact.interventions.extend(lm.interventions)
    pairs = zip(score(exact, probe.examples), probe.scores, strict=True)
    noise = max(abs(a - b) for one, other in pairs for a, b in zip(one.totals, other, strict=True))
    exact.interventions.clear()
    return max(1e-3, 4 * noise)


def max_new_tokens(run: Run) -> int:
    """How far an answer of this run's models may go, measured or served."""
    longest = max(example.supervised_tokens for example in run.examples)
    return min(max(LEAST_NEW_TOKENS, longest), MOST_NEW_TOKENS)
